// Constraint forces of one world by Newton's method: body of a function that the threads of one block enter together.
//
// Minimises over qacc
//
//     1/2 (qacc - qacc_smooth)' M (qacc - qacc_smooth) + sum over constraints of cost(J qacc - aref)
//
// as MuJoCo does (https://mujoco.readthedocs.io/en/stable/computation/index.html#solver): friction of joints costs like
// Huber's function, a limit half a parabola, a contact the squared distance to its elliptic cone. Gradient and Hessian
// are exact, the step along the search direction is the minimum on that line, which is convex.
//
// A constraint is a block of rows of J with the same columns: one for joint friction and limits, `dim` for a contact.
// What is needed often (qacc, M qacc, gradient, search direction, Hessian) lies in shared memory. Each warp sums up the
// constraints that it goes through in a gradient and a Hessian of its own, because threads that add to the same number
// wait for each other. The Hessian couples bodies that touch something that moves; where nothing couples the degrees of
// freedom before `i` with those from `i` on, it falls apart, and the parts are factorised side by side: small ones by
// half a warp each, which holds them in registers.
//
// The same code runs on a CPU, where a block is one thread. Every part of an iteration stands here once, and loops that
// gain nothing by it are not unrolled: a GPU waits for instructions that do not fit into its cache.
//
// Names from outside: NV (at least nv), MAX_ROWS (of a constraint), MAX_WARPS, MIN_VALUE, FRICTION_DOF,
// CONTACT_ELLIPTIC, SATISFIED, QUADRATIC, LINEAR, CONE; the arguments of `libero_gym.physics.newton.solve`.

#if defined(__CUDA_ARCH__)
#define SHARED __shared__
#define BLOCK_SYNC() __syncthreads()
#define WARP_SYNC() __syncwarp()
#define LOWER(target, value) atomicMin(&(target), (value))
    const int width = 32;
    const int team_size = 8;
    const int half_size = 16;
#else
#define SHARED
#define BLOCK_SYNC()
#define WARP_SYNC()
#define LOWER(target, value) ((target) = (value) < (target) ? (value) : (target))
    const int width = 1;
    const int team_size = 1;
    const int half_size = 0;
#endif
#define ENTRY(row, column) hessian[(row) * ((row) + 1) / 2 + (column)]
// Rows of a constraint, with a bound that the compiler knows.
#define FOR_ROWS(r, from) _Pragma("unroll") for (int r = from; r < MAX_ROWS; ++r) if (r < rows)

    const int warp = lane / width, num_warps = lanes / width, thread = lane % width;
    const int team = lane / team_size, num_teams = lanes / team_size, member = lane % team_size;

    const int num_rows = wp::min(problem.nefc.data[world], problem.njmax);
    const int num_blocks = wp::min(problem.num_blocks.data[world], num_rows);
    const int num_frictions = wp::min(problem.nf.data[world], num_rows);
    const int num_items = num_blocks + num_frictions;
    const int hessian_size = nv * (nv + 1) / 2;

    const float* M = wp::address(problem.M, world, 0);
    const float* qfrc_smooth = wp::address(problem.qfrc_smooth, world, 0);
    const float* J = wp::address(problem.J, world, 0, 0);
    const int* J_colind = wp::address(problem.J_colind, world, 0, 0);
    const int* J_rownnz = wp::address(problem.J_rownnz, world, 0);
    const int* J_rowadr = wp::address(problem.J_rowadr, world, 0);
    const int* block_adr = wp::address(problem.block_adr, world, 0);
    const int* block_nrow = wp::address(problem.block_nrow, world, 0);
    const int* efc_type = wp::address(problem.efc_type, world, 0);
    const int* efc_id = wp::address(problem.efc_id, world, 0);
    const float* efc_D = wp::address(problem.efc_D, world, 0);
    const float* efc_frictionloss = wp::address(problem.efc_frictionloss, world, 0);
    float* efc_force = wp::address(problem.efc_force, world, 0);
    int* efc_state = wp::address(problem.efc_state, world, 0);
    float* residual = wp::address(problem.residual, world, 0);    // J qacc - aref
    float* motion = wp::address(problem.motion, world, 0);        // J search
    float* curvature = wp::address(problem.curvature, world, 0);  // Hessian of a constraint's cost, MAX_ROWS a row

    SHARED float hessian[MAX_WARPS * NV * (NV + 1) / 2];
    SHARED float gradient[MAX_WARPS * NV];
    SHARED float qacc[NV], Ma[NV], search[NV], Msearch[NV];
    SHARED int first[NV];   // first column of each row of the Hessian that can differ from 0
    SHARED int lowest[NV];  // the least of `first` from a row on
    SHARED int next[NV];    // where the independent part ends that begins at an index
    SHARED int small[NV], large[NV], num_small, num_large;  // where parts begin that half a warp can hold, and others
    SHARED float sums[2][3][MAX_WARPS];
    int parity = 0;

    auto sum = [&](float& a, float& b, float& c) {
#if defined(__CUDA_ARCH__)
#pragma unroll 1
        for (int offset = width / 2; offset > 0; offset /= 2) {
            a += __shfl_xor_sync(0xffffffffu, a, offset);
            b += __shfl_xor_sync(0xffffffffu, b, offset);
            c += __shfl_xor_sync(0xffffffffu, c, offset);
        }
        if (num_warps > 1) {
            // Two places in turn: who comes first to the next sum must not overwrite what others still read.
            if (thread == 0) {
                sums[parity][0][warp] = a;
                sums[parity][1][warp] = b;
                sums[parity][2][warp] = c;
            }
            BLOCK_SYNC();
            a = b = c = 0.0f;
#pragma unroll 1
            for (int w = 0; w < num_warps; ++w) {
                a += sums[parity][0][w];
                b += sums[parity][1][w];
                c += sums[parity][2][w];
            }
            parity = 1 - parity;
        }
#endif
    };

    // A constraint: its first row, number of rows, and kind.
    auto item_row = [&](int item) { return item < num_blocks ? block_adr[item] : item - num_blocks; };
    auto item_rows = [&](int item) { return item < num_blocks ? block_nrow[item] : 1; };

    // Force and curvature of a row that is no contact's, at `x` = J qacc - aref.
    auto evaluate_row = [&](int row, int type, float x, float& force, float& curve) {
        const float D = efc_D[row];
        force = -D * x;
        curve = D;
        if (type == FRICTION_DOF) {
            const float loss = efc_frictionloss[row];
            if (wp::abs(x) * D < loss) return QUADRATIC;
            force = x > 0.0f ? -loss : loss;
            curve = 0.0f;
            return LINEAR;
        }
        if (x < 0.0f) return QUADRATIC;
        force = curve = 0.0f;
        return SATISFIED;
    };

    // Factors of a contact's rows with which its cone is N >= mu T, N = scale[0] x[0] and T = |scale[1:] x[1:]|.
    auto read_scale = [&](int row, int rows, float* scale) {
        const auto& friction = problem.contact_friction.data[efc_id[row]];
        FOR_ROWS(r, 1) scale[r] = friction[r - 1];
        scale[0] = friction[0] * impratio_invsqrt;
    };

    auto cone_zone = [&](float mu, float N, float T) {
        if (T <= 0.0f) return N >= 0.0f ? SATISFIED : QUADRATIC;
        if (N >= mu * T) return SATISFIED;
        return mu * N + T <= 0.0f ? QUADRATIC : CONE;
    };

    // First and second derivative of the cost along `search` at a distance `alpha`, and the sum of the first's terms
    // without their signs.
    auto evaluate_line = [&](float alpha, float& slope, float& curve, float& magnitude) {
        slope = curve = magnitude = 0.0f;
#pragma unroll 1
        for (int i = lane; i < nv; i += lanes) {
            const float term = search[i] * (Ma[i] - qfrc_smooth[i] + alpha * Msearch[i]);
            slope += term;
            curve += search[i] * Msearch[i];
            magnitude += wp::abs(term);
        }
#pragma unroll 1
        for (int item = lane; item < num_items; item += lanes) {
            const int row = item_row(item), rows = item_rows(item), type = efc_type[row];
            if (type != CONTACT_ELLIPTIC) {
                const float v = motion[row];
                float force, row_curve;
                evaluate_row(row, type, residual[row] + alpha * v, force, row_curve);
                slope -= force * v;
                curve += row_curve * v * v;
                magnitude += wp::abs(force * v);
                continue;
            }
            float scale[MAX_ROWS], x[MAX_ROWS], v[MAX_ROWS];
            read_scale(row, rows, scale);
            FOR_ROWS(r, 0) {
                v[r] = motion[row + r];
                x[r] = residual[row + r] + alpha * v[r];
            }
            float TT = 0.0f, uv = 0.0f, vv = 0.0f;
            FOR_ROWS(r, 1) {
                const float scaled_x = scale[r] * x[r], scaled_v = scale[r] * v[r];
                TT += scaled_x * scaled_x;
                uv += scaled_x * scaled_v;
                vv += scaled_v * scaled_v;
            }
            const float mu = scale[0], N = mu * x[0], T = wp::sqrt(TT);
            const int zone = cone_zone(mu, N, T);
            if (zone == QUADRATIC) {
                FOR_ROWS(r, 0) {
                    const float Dv = efc_D[row + r] * v[r];
                    slope += Dv * x[r];
                    curve += Dv * v[r];
                    magnitude += wp::abs(Dv * x[r]);
                }
            } else if (zone == CONE) {
                const float D = efc_D[row] / wp::max(mu * mu * (1.0f + mu * mu), MIN_VALUE);
                const float gap = N - mu * T, dT = uv / T;
                const float dgap = mu * (v[0] - dT), ddT = wp::max(vv - dT * dT, 0.0f) / T;
                slope += D * gap * dgap;
                curve += D * (dgap * dgap - mu * gap * ddT);
                magnitude += wp::abs(D * gap * dgap);
            }
        }
        sum(slope, curve, magnitude);
    };

    // Forces, states and curvatures of the constraints at `residual`.
    auto evaluate_constraints = [&]() {
#pragma unroll 1
        for (int item = lane; item < num_items; item += lanes) {
            const int row = item_row(item), rows = item_rows(item), type = efc_type[row];
            if (type != CONTACT_ELLIPTIC) {
                efc_state[row] = evaluate_row(row, type, residual[row], efc_force[row], curvature[MAX_ROWS * row]);
                continue;
            }
            float scale[MAX_ROWS], x[MAX_ROWS], D[MAX_ROWS];
            read_scale(row, rows, scale);
            FOR_ROWS(r, 0) {
                x[r] = residual[row + r];
                D[r] = efc_D[row + r];
            }
            float TT = 0.0f;
            FOR_ROWS(r, 1) TT += scale[r] * scale[r] * x[r] * x[r];
            const float mu = scale[0], N = mu * x[0], T = wp::sqrt(TT);
            const int zone = cone_zone(mu, N, T);
            // In the cone: force and curvature by the scaled rows, times their scales; `unit` points along the friction.
            const float weight = D[0] / wp::max(mu * mu * (1.0f + mu * mu), MIN_VALUE);
            const float gap = N - mu * T, inverse = 1.0f / wp::max(T, MIN_VALUE);
            float unit[MAX_ROWS];
            FOR_ROWS(r, 1) unit[r] = -mu * scale[r] * x[r] * inverse;
            unit[0] = 1.0f;
            FOR_ROWS(r, 0) {
                efc_state[row + r] = zone;
                float force = 0.0f;
                if (zone == QUADRATIC) force = -D[r] * x[r];
                if (zone == CONE) force = -weight * gap * scale[r] * unit[r];
                efc_force[row + r] = force;
            }
            if (zone == SATISFIED) continue;
#pragma unroll
            for (int a = 0; a < MAX_ROWS; ++a) {
#pragma unroll
                for (int b = 0; b < MAX_ROWS; ++b) {
                    if (a >= rows || b >= rows) continue;
                    float entry = a == b ? D[a] : 0.0f;
                    if (zone == CONE) {
                        // d2/dN2 = 1, d2/dN dt = -mu t', d2/dt2 = mu^2 t t' - mu gap / T (1 - t t')
                        float part = unit[a] * unit[b];
                        if (a > 0 && b > 0) {
                            part *= 1.0f + gap * inverse / mu;
                            if (a == b) part -= mu * gap * inverse;
                        }
                        entry = weight * scale[a] * scale[b] * part;
                    }
                    curvature[MAX_ROWS * (row + a) + b] = entry;
                }
            }
        }
        BLOCK_SYNC();
    };

    // Gradient M qacc - qfrc_smooth - J' force and Hessian M + J' curvature J.
    auto assemble = [&]() {
#pragma unroll 1
        for (int entry = lane; entry < num_warps * hessian_size; entry += lanes) hessian[entry] = 0.0f;
#pragma unroll 1
        for (int i = lane; i < num_warps * nv; i += lanes) gradient[i] = i < nv ? Ma[i] - qfrc_smooth[i] : 0.0f;
        BLOCK_SYNC();
#pragma unroll 1
        for (int k = lane; k < problem.M_entry.shape[0]; k += lanes) hessian[problem.M_entry.data[k]] = M[k];
        BLOCK_SYNC();
        float* own_hessian = hessian + warp * hessian_size;
        float* own_gradient = gradient + warp * nv;
        const int own_a = static_cast<int>((wp::sqrt(8.0f * thread + 1.0f) - 1.0f) * 0.5f);
#pragma unroll 1
        for (int item = warp; item < num_blocks; item += num_warps) {
            const int row = block_adr[item], rows = block_nrow[item], state = efc_state[row];
            if (state == SATISFIED) continue;
            const int begin = J_rowadr[row], count = J_rownnz[row];
            const int* columns = J_colind + begin;
#pragma unroll 1
            for (int k = thread; k < count; k += width) {
                float pull = 0.0f;
                FOR_ROWS(r, 0) pull += J[begin + r * count + k] * efc_force[row + r];
                own_gradient[columns[k]] -= pull;
            }
            float curve[MAX_ROWS][MAX_ROWS];
            FOR_ROWS(r, 0) {
#pragma unroll
                for (int c = 0; c < MAX_ROWS; ++c) curve[r][c] = c < rows ? curvature[MAX_ROWS * (row + r) + c] : 0.0f;
            }
#pragma unroll 1
            for (int entry = thread; entry < count * (count + 1) / 2; entry += width) {
                int a = own_a;
                if (entry != thread) a = static_cast<int>((wp::sqrt(8.0f * entry + 1.0f) - 1.0f) * 0.5f);
                const int b = entry - a * (a + 1) / 2;
                float here[MAX_ROWS], there[MAX_ROWS], value = 0.0f;
#pragma unroll
                for (int r = 0; r < MAX_ROWS; ++r) {
                    here[r] = r < rows ? J[begin + r * count + a] : 0.0f;
                    there[r] = r < rows ? J[begin + r * count + b] : 0.0f;
                }
                FOR_ROWS(r, 0) {
#pragma unroll
                    for (int c = 0; c < MAX_ROWS; ++c) value += here[r] * curve[r][c] * there[c];
                }
                const int i = wp::max(columns[a], columns[b]), j = wp::min(columns[a], columns[b]);
                own_hessian[i * (i + 1) / 2 + j] += value;
            }
            WARP_SYNC();
        }
        BLOCK_SYNC();
#pragma unroll 1
        for (int w = 1; w < num_warps; ++w) {
#pragma unroll 1
            for (int entry = lane; entry < hessian_size; entry += lanes) {
                hessian[entry] += hessian[w * hessian_size + entry];
            }
#pragma unroll 1
            for (int i = lane; i < nv; i += lanes) gradient[i] += gradient[w * nv + i];
        }
        BLOCK_SYNC();
        // Joint friction: one row for a degree of freedom.
#pragma unroll 1
        for (int row = lane; row < num_frictions; row += lanes) {
            const int i = J_colind[J_rowadr[row]];
            const float factor = J[J_rowadr[row]];
            gradient[i] -= factor * efc_force[row];
            ENTRY(i, i) += factor * factor * curvature[MAX_ROWS * row];
        }
        BLOCK_SYNC();
    };

    // Factorise rows and columns begin..end-1 of the Hessian, which nothing couples with others, and solve for `search`.
    // The factor overwrites the lower triangle, its diagonal inverted.
    auto solve_part = [&](int begin, int end) {
#pragma unroll 1
        for (int k = begin; k < end; ++k) {
            const float inverse = 1.0f / wp::sqrt(wp::max(ENTRY(k, k), MIN_VALUE));
            const float solved = search[k] * inverse;
            WARP_SYNC();
            if (thread == 0) {
                ENTRY(k, k) = inverse;
                search[k] = solved;
            }
#pragma unroll 1
            for (int i = k + 1 + thread; i < end; i += width) {
                if (first[i] > k) continue;
                ENTRY(i, k) *= inverse;
                search[i] -= ENTRY(i, k) * solved;
            }
            WARP_SYNC();
            const int left = end - k - 1;
#pragma unroll 1
            for (int pair = thread; pair < left * (left + 1) / 2; pair += width) {
                const int a = static_cast<int>((wp::sqrt(8.0f * pair + 1.0f) - 1.0f) * 0.5f);
                const int i = k + 1 + a, j = k + 1 + pair - a * (a + 1) / 2;
                if (first[i] <= k && first[j] <= k) ENTRY(i, j) -= ENTRY(i, k) * ENTRY(j, k);
            }
            WARP_SYNC();
        }
#pragma unroll 1
        for (int k = end - 1; k >= begin; --k) {
            const float solved = search[k] * ENTRY(k, k);
            WARP_SYNC();
            if (thread == 0) search[k] = solved;
#pragma unroll 1
            for (int j = first[k] + thread; j < k; j += width) search[j] -= ENTRY(k, j) * solved;
            WARP_SYNC();
        }
    };

#if defined(__CUDA_ARCH__)
    // The same for parts of at most `half_size` rows, one by each half of a warp: a thread holds a row, of which the
    // columns move one place to the left in every step. `size` may be 0.
    auto solve_small_parts = [&](int begin, int size) {
        const unsigned int all = 0xffffffffu;
        const int t = thread % half_size;
        const int steps = wp::max(size, __shfl_xor_sync(all, size, half_size));
        float row[half_size], own_inverse = 0.0f;
        float value = t < size ? search[begin + t] : 0.0f;
#pragma unroll
        for (int c = 0; c < half_size; ++c) row[c] = c <= t && t < size ? ENTRY(begin + t, begin + c) : 0.0f;
#pragma unroll 1
        for (int k = 0; k < steps; ++k) {
            const float inverse = rsqrtf(wp::max(__shfl_sync(all, row[0], k, half_size), MIN_VALUE));
            const float solved = __shfl_sync(all, value, k, half_size) * inverse;
            const float factor = row[0] * inverse;
            if (t == k) {
                own_inverse = inverse;
                value = solved;
            } else if (t > k) {
                value -= factor * solved;
                if (t < size) ENTRY(begin + t, begin + k) = factor;
            }
#pragma unroll
            for (int c = 1; c < half_size; ++c) row[c - 1] = row[c] - factor * __shfl_sync(all, factor, k + c, half_size);
        }
        WARP_SYNC();
#pragma unroll 1
        for (int k = steps - 1; k >= 0; --k) {
            const float solved = __shfl_sync(all, value * own_inverse, k, half_size);
            if (t == k) value = solved;
            if (t < k && k < size) value -= ENTRY(begin + k, begin + t) * solved;
        }
        if (t < size) search[begin + t] = value;
    };
#endif

    // Where the Hessian falls apart, whatever the constraints' states.
    auto find_parts = [&]() {
#pragma unroll 1
        for (int i = lane; i < nv; i += lanes) first[i] = problem.M_colind.data[problem.M_rowadr.data[i]];
        BLOCK_SYNC();
#pragma unroll 1
        for (int item = lane; item < num_blocks; item += lanes) {
            const int row = block_adr[item], begin = J_rowadr[row], end = begin + J_rownnz[row];
            int low = nv;
#pragma unroll 1
            for (int k = begin; k < end; ++k) low = wp::min(low, J_colind[k]);
#pragma unroll 1
            for (int k = begin; k < end; ++k) LOWER(first[J_colind[k]], low);
        }
        BLOCK_SYNC();
#pragma unroll 1
        for (int i = lane; i < nv; i += lanes) {
            int low = i;
#pragma unroll 4
            for (int row = i; row < nv; ++row) low = wp::min(low, first[row]);
            lowest[i] = low;
        }
        BLOCK_SYNC();
#pragma unroll 1
        for (int i = lane; i < nv; i += lanes) {
            int end = i + 1;
            while (end < nv && lowest[end] < end) ++end;
            next[i] = end;
        }
        BLOCK_SYNC();
        if (lane == 0) {
            num_small = num_large = 0;
#pragma unroll 1
            for (int begin = 0; begin < nv; begin = next[begin]) {
                if (next[begin] - begin > half_size) {
                    large[num_large++] = begin;
                } else {
                    small[num_small++] = begin;
                }
            }
        }
        BLOCK_SYNC();
    };

    // Newton's direction: minus the Hessian's inverse times the gradient.
    auto find_search = [&]() {
#pragma unroll 1
        for (int i = lane; i < nv; i += lanes) search[i] = -gradient[i];
        BLOCK_SYNC();
#pragma unroll 1
        for (int part = warp; part < num_large; part += num_warps) solve_part(large[part], next[large[part]]);
#if defined(__CUDA_ARCH__)
#pragma unroll 1
        for (int pair = 2 * warp; pair < num_small; pair += 2 * num_warps) {
            const int part = pair + thread / half_size;
            const int begin = part < num_small ? small[part] : 0;
            solve_small_parts(begin, part < num_small ? next[begin] - begin : 0);
        }
#endif
        BLOCK_SYNC();
    };

    // M search and J search.
    auto follow_search = [&]() {
#pragma unroll 1
        for (int i = lane; i < nv; i += lanes) {
            const int begin = problem.M_mulm_rowadr.data[i], end = problem.M_mulm_rowadr.data[i + 1];
            float product = 0.0f;
#pragma unroll 4
            for (int k = begin; k < end; ++k) {
                product += M[problem.M_mulm_madr.data[k]] * search[problem.M_mulm_col.data[k]];
            }
            Msearch[i] = product;
        }
#pragma unroll 1
        for (int item = team; item < num_items; item += num_teams) {
            const int row = item_row(item), rows = item_rows(item);
            const int begin = J_rowadr[row], count = J_rownnz[row];
            float product[MAX_ROWS];
#pragma unroll
            for (int r = 0; r < MAX_ROWS; ++r) product[r] = 0.0f;
#pragma unroll 1
            for (int k = member; k < count; k += team_size) {
                const float value = search[J_colind[begin + k]];
                FOR_ROWS(r, 0) product[r] += J[begin + r * count + k] * value;
            }
#pragma unroll
            for (int r = 0; r < MAX_ROWS; ++r) {
#if defined(__CUDA_ARCH__)
                const unsigned int threads = 0xffu << (thread & ~(team_size - 1));
#pragma unroll
                for (int offset = team_size / 2; offset > 0; offset /= 2) {
                    product[r] += __shfl_xor_sync(threads, product[r], offset);
                }
#endif
                if (member == 0 && r < rows) motion[row + r] = product[r];
            }
        }
        BLOCK_SYNC();
    };

    float trace = 0.0f, unused_a = 0.0f, unused_b = 0.0f;
#pragma unroll 1
    for (int i = lane; i < nv; i += lanes) {
        qacc[i] = Ma[i] = 0.0f;
        search[i] = num_items > 0 ? wp::address(problem.qacc_warmstart, world, 0)[i]
                                  : wp::address(problem.qacc_smooth, world, 0)[i];
        trace += M[problem.M_rowadr.data[i] + problem.M_rownnz.data[i] - 1];
    }
#pragma unroll 1
    for (int row = lane; row < num_rows; row += lanes) residual[row] = -wp::address(problem.efc_aref, world, row)[0];
    sum(trace, unused_a, unused_b);
    const float scale = 1.0f / wp::max(trace, MIN_VALUE);
    find_parts();

    // The first step leads from 0 to the start, each of the others to the minimum along Newton's direction.
    float search_norm = 0.0f;
    int iteration = -1;
#pragma unroll 1
    while (true) {
        follow_search();

        float alpha = 0.0f, gain = 0.0f;
        if (iteration < 0) {
            alpha = 1.0f;
        } else {
            // The slope grows along the line: Newton's steps towards its root, halving where they leave the bracket.
            float low = 0.0f, high = -1.0f, accepted = 0.0f;  // high < 0: not known yet
#pragma unroll 1
            for (int step = 0; step <= max_linesearch; ++step) {
                float slope, curve, magnitude;
                evaluate_line(alpha, slope, curve, magnitude);
                if (step == 0) {
                    // What float32 cannot resolve is no slope: eight units in the last place of the sum's terms.
                    const float noise = 8.0f * 1.1920929e-7f * magnitude;
                    if (slope >= -noise) break;
                    accepted = wp::max(wp::max(tolerance * ls_tolerance * search_norm / scale, 1e-6f), noise);
                    gain = -slope;
                } else if (wp::abs(slope) < accepted) {
                    break;
                } else if (slope < 0.0f) {
                    low = alpha;
                } else {
                    high = alpha;
                }
                float candidate = alpha - slope / wp::max(curve, MIN_VALUE);
                if (candidate <= low || (high > 0.0f && candidate >= high)) {
                    candidate = high > 0.0f ? 0.5f * (low + high) : 2.0f * low + 1.0f;
                }
                if (step == max_linesearch || candidate == alpha) break;
                alpha = candidate;
            }
            if (alpha == 0.0f) break;
        }

#pragma unroll 1
        for (int i = lane; i < nv; i += lanes) {
            qacc[i] += alpha * search[i];
            Ma[i] += alpha * Msearch[i];
        }
#pragma unroll 1
        for (int item = lane; item < num_items; item += lanes) {
            const int row = item_row(item), rows = item_rows(item);
            FOR_ROWS(r, 0) residual[row + r] += alpha * motion[row + r];
        }
        ++iteration;
        BLOCK_SYNC();
        evaluate_constraints();
        assemble();

        float gradient_norm = 0.0f;
        unused_a = unused_b = 0.0f;
#pragma unroll 1
        for (int i = lane; i < nv; i += lanes) gradient_norm += gradient[i] * gradient[i];
        sum(gradient_norm, unused_a, unused_b);
        // The slope only grows along the line, so that no step gained more than its length times the slope at its start.
        const bool is_small = scale * alpha * gain < tolerance || scale * wp::sqrt(gradient_norm) < tolerance;
        if (num_items == 0 || iteration == max_iterations || (iteration > 0 && is_small)) break;

        find_search();
        float decrement = 0.0f;
        search_norm = unused_a = 0.0f;
#pragma unroll 1
        for (int i = lane; i < nv; i += lanes) {
            decrement -= search[i] * gradient[i];
            search_norm += search[i] * search[i];
        }
        sum(decrement, search_norm, unused_a);
        search_norm = wp::sqrt(search_norm);
        if (iteration > 0 && scale * 0.5f * decrement < tolerance) break;
    }

#pragma unroll 1
    for (int i = lane; i < nv; i += lanes) {
        wp::address(problem.qacc, world, 0)[i] = qacc[i];
        wp::address(problem.Ma, world, 0)[i] = Ma[i];
        wp::address(problem.qfrc_constraint, world, 0)[i] = Ma[i] - qfrc_smooth[i] - gradient[i];
    }
    if (lane == 0) problem.solver_niter.data[world] = iteration;

#undef SHARED
#undef BLOCK_SYNC
#undef WARP_SYNC
#undef LOWER
#undef ENTRY
#undef FOR_ROWS
