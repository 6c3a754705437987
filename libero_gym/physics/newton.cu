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
// What is needed often (qacc, M qacc, gradient, search direction, Hessian) lies in shared memory. The Hessian couples
// bodies that touch something that moves; where nothing couples the degrees of freedom before `i` with those from `i`
// on, it falls apart, and the parts are factorised side by side, one by each warp.
//
// The same code runs on a CPU, where a block is one thread.
//
// Names from outside: NV (at least nv), MAX_WARPS, MIN_VALUE, FRICTION_DOF, CONTACT_ELLIPTIC, SATISFIED, QUADRATIC,
// LINEAR, CONE; the arguments of `libero_gym.physics.newton.solve`.

#if defined(__CUDA_ARCH__)
#define SHARED __shared__
#define BLOCK_SYNC() __syncthreads()
#define WARP_SYNC() __syncwarp()
#define ADD(target, value) atomicAdd(&(target), (value))
#define LOWER(target, value) atomicMin(&(target), (value))
    const int width = 32;
    const int team_size = 8;
#else
#define SHARED
#define BLOCK_SYNC()
#define WARP_SYNC()
#define ADD(target, value) ((target) += (value))
#define LOWER(target, value) ((target) = (value) < (target) ? (value) : (target))
    const int width = 1;
    const int team_size = 1;
#endif
#define ENTRY(row, column) hessian[(row) * ((row) + 1) / 2 + (column)]

    const int warp = lane / width, num_warps = lanes / width, thread = lane % width;
    const int team = lane / team_size, num_teams = lanes / team_size, member = lane % team_size;

    const int num_rows = wp::min(problem.nefc.data[world], problem.njmax);
    const int num_blocks = wp::min(problem.num_blocks.data[world], num_rows);
    const int num_frictions = wp::min(problem.nf.data[world], num_rows);
    const int num_items = num_blocks + num_frictions;

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
    const float* efc_aref = wp::address(problem.efc_aref, world, 0);
    const float* efc_frictionloss = wp::address(problem.efc_frictionloss, world, 0);
    float* efc_force = wp::address(problem.efc_force, world, 0);
    int* efc_state = wp::address(problem.efc_state, world, 0);
    float* residual = wp::address(problem.residual, world, 0);    // J qacc - aref
    float* motion = wp::address(problem.motion, world, 0);        // J search
    float* curvature = wp::address(problem.curvature, world, 0);  // Hessian of a block's cost: 6 numbers a row

    SHARED float hessian[NV * (NV + 1) / 2];
    SHARED float qacc[NV], Ma[NV], gradient[NV], search[NV], Msearch[NV];
    SHARED int first[NV];   // first column of each row of the Hessian that can differ from 0
    SHARED int lowest[NV];  // the least of `first` from a row on
    SHARED int next[NV];    // where the independent part ends that begins at an index
    SHARED float sums[2][3][MAX_WARPS];
    int parity = 0;

    auto sum = [&](float& a, float& b, float& c) {
#if defined(__CUDA_ARCH__)
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
            for (int w = 0; w < num_warps; ++w) {
                a += sums[parity][0][w];
                b += sums[parity][1][w];
                c += sums[parity][2][w];
            }
            parity = 1 - parity;
        }
#endif
    };

    auto multiply_by_inertia = [&](const float* vector, float* product) {
        for (int i = lane; i < nv; i += lanes) product[i] = 0.0f;
        BLOCK_SYNC();
        for (int i = lane; i < nv; i += lanes) {
            const int begin = problem.M_rowadr.data[i], end = begin + problem.M_rownnz.data[i];
            float row_sum = 0.0f;
            for (int k = begin; k < end; ++k) {
                const int j = problem.M_colind.data[k];
                row_sum += M[k] * vector[j];
                if (j != i) ADD(product[j], M[k] * vector[i]);
            }
            ADD(product[i], row_sum);
        }
        BLOCK_SYNC();
    };

    auto multiply_row = [&](int row, const float* vector) {
        const int begin = J_rowadr[row], count = J_rownnz[row];
        float product = 0.0f;
        for (int k = begin; k < begin + count; ++k) product += J[k] * vector[J_colind[k]];
        return product;
    };

    // A constraint: its first row, number of rows, and kind.
    auto item_row = [&](int item) { return item < num_blocks ? block_adr[item] : item - num_blocks; };
    auto item_rows = [&](int item) { return item < num_blocks ? block_nrow[item] : 1; };

    // Force and curvature of a row that is no contact's, at `x` = J qacc - aref.
    auto evaluate_row = [&](int row, float x, float& force, float& curve) {
        const float D = efc_D[row];
        force = -D * x;
        curve = D;
        if (efc_type[row] == FRICTION_DOF) {
            const float loss = efc_frictionloss[row];
            if (wp::abs(x) * D >= loss) {
                force = x > 0.0f ? -loss : loss;
                curve = 0.0f;
                return LINEAR;
            }
            return QUADRATIC;
        }
        if (x >= 0.0f) {
            force = curve = 0.0f;
            return SATISFIED;
        }
        return QUADRATIC;
    };

    auto contact_friction = [&](int row, int rows, float& mu, float* scale) {
        const auto& friction = problem.contact_friction.data[efc_id[row]];
        mu = friction[0] * impratio_invsqrt;
        for (int r = 1; r < rows; ++r) scale[r] = friction[r - 1];
        scale[0] = mu;  // so that the cone is N >= mu * T, N = scale[0] * x[0], T = |scale[1:] * x[1:]|
    };

    auto cone_zone = [&](float mu, float N, float T) {
        if (T <= 0.0f) return N >= 0.0f ? SATISFIED : QUADRATIC;
        if (N >= mu * T) return SATISFIED;
        return mu * N + T <= 0.0f ? QUADRATIC : CONE;
    };

    // First and second derivative of the constraints' cost along `search`, at a distance `alpha`.
    auto evaluate_line = [&](float alpha, float& slope, float& curve, float& magnitude) {
        for (int item = lane; item < num_items; item += lanes) {
            const int row = item_row(item), rows = item_rows(item);
            if (efc_type[row] != CONTACT_ELLIPTIC) {
                float force, row_curve;
                evaluate_row(row, residual[row] + alpha * motion[row], force, row_curve);
                slope -= force * motion[row];
                curve += row_curve * motion[row] * motion[row];
                magnitude += wp::abs(force * motion[row]);
                continue;
            }
            float mu, scale[6];
            contact_friction(row, rows, mu, scale);
            const float N = mu * (residual[row] + alpha * motion[row]), dN = mu * motion[row];
            float TT = 0.0f, uv = 0.0f, vv = 0.0f;
            for (int r = 1; r < rows; ++r) {
                const float v = scale[r] * motion[row + r], u = scale[r] * residual[row + r] + alpha * v;
                TT += u * u;
                uv += u * v;
                vv += v * v;
            }
            const float T = wp::sqrt(TT);
            const int zone = cone_zone(mu, N, T);
            if (zone == QUADRATIC) {
                for (int r = row; r < row + rows; ++r) {
                    const float v = motion[r], Dv = efc_D[r] * v, row_slope = Dv * (residual[r] + alpha * v);
                    slope += row_slope;
                    curve += Dv * v;
                    magnitude += wp::abs(row_slope);
                }
            } else if (zone == CONE) {
                const float D = efc_D[row] / wp::max(mu * mu * (1.0f + mu * mu), MIN_VALUE);
                const float gap = N - mu * T, dT = uv / T;
                const float dgap = dN - mu * dT, ddT = wp::max(vv - dT * dT, 0.0f) / T;
                slope += D * gap * dgap;
                curve += D * (dgap * dgap - mu * gap * ddT);
                magnitude += wp::abs(D * gap * dgap);
            }
        }
    };

    // Forces, states and curvatures of the constraints at `residual`.
    auto evaluate_constraints = [&]() {
        for (int item = lane; item < num_items; item += lanes) {
            const int row = item_row(item), rows = item_rows(item);
            if (efc_type[row] != CONTACT_ELLIPTIC) {
                efc_state[row] = evaluate_row(row, residual[row], efc_force[row], curvature[6 * row]);
                continue;
            }
            float mu, scale[6], tangent[6];
            contact_friction(row, rows, mu, scale);
            const float N = mu * residual[row];
            float TT = 0.0f;
            for (int r = 1; r < rows; ++r) {
                tangent[r] = scale[r] * residual[row + r];
                TT += tangent[r] * tangent[r];
            }
            const float T = wp::sqrt(TT);
            const int zone = cone_zone(mu, N, T);
            const float D = efc_D[row] / wp::max(mu * mu * (1.0f + mu * mu), MIN_VALUE);
            const float gap = N - mu * T;
            for (int r = 0; r < rows; ++r) {
                const int here = row + r;
                efc_state[here] = zone;
                float* curve = curvature + 6 * here;
                if (zone == SATISFIED) {
                    efc_force[here] = 0.0f;
                } else if (zone == QUADRATIC) {
                    efc_force[here] = -efc_D[here] * residual[here];
                    for (int c = 0; c < rows; ++c) curve[c] = c == r ? efc_D[here] : 0.0f;
                } else if (r == 0) {
                    efc_force[here] = -D * gap * mu;
                    curve[0] = D * mu * mu;
                    for (int c = 1; c < rows; ++c) curve[c] = -D * mu * mu * scale[c] * tangent[c] / T;
                } else {
                    const float unit = tangent[r] / T;
                    efc_force[here] = D * gap * mu * scale[r] * unit;
                    curve[0] = -D * mu * mu * scale[r] * unit;
                    for (int c = 1; c < rows; ++c) {
                        const float other = tangent[c] / T, pull = mu * N / T;
                        const float entry = pull * unit * other + (c == r ? mu * mu - pull : 0.0f);
                        curve[c] = D * scale[r] * scale[c] * entry;
                    }
                }
            }
        }
        BLOCK_SYNC();
    };

    // Gradient M qacc - qfrc_smooth - J' force and Hessian M + J' curvature J.
    auto assemble = [&]() {
        for (int i = lane; i < nv; i += lanes) {
            gradient[i] = Ma[i] - qfrc_smooth[i];
            const int begin = problem.M_rowadr.data[i], count = problem.M_rownnz.data[i];
            first[i] = problem.M_colind.data[begin];
            for (int j = 0; j <= i; ++j) ENTRY(i, j) = 0.0f;
            for (int k = begin; k < begin + count; ++k) ENTRY(i, problem.M_colind.data[k]) = M[k];
        }
        BLOCK_SYNC();
        for (int item = team; item < num_items; item += num_teams) {
            const int row = item_row(item), rows = item_rows(item);
            if (efc_state[row] == SATISFIED) continue;
            const int begin = J_rowadr[row], count = J_rownnz[row];
            for (int k = member; k < count; k += team_size) {
                float pull = 0.0f;
                for (int r = 0; r < rows; ++r) pull += J[begin + r * count + k] * efc_force[row + r];
                ADD(gradient[J_colind[begin + k]], -pull);
            }
            if (efc_state[row] == LINEAR) continue;
            for (int entry = member; entry < count * (count + 1) / 2; entry += team_size) {
                int a = static_cast<int>((wp::sqrt(8.0f * entry + 1.0f) - 1.0f) * 0.5f);
                const int b = entry - a * (a + 1) / 2;
                float value = 0.0f;
                for (int r = 0; r < rows; ++r) {
                    float curved = 0.0f;
                    for (int c = 0; c < rows; ++c) curved += curvature[6 * (row + r) + c] * J[begin + c * count + b];
                    value += J[begin + r * count + a] * curved;
                }
                const int i = wp::max(J_colind[begin + a], J_colind[begin + b]);
                const int j = wp::min(J_colind[begin + a], J_colind[begin + b]);
                ADD(ENTRY(i, j), value);
                LOWER(first[i], j);
            }
        }
        BLOCK_SYNC();
    };

    // Factorise rows and columns begin..end-1 of the Hessian, which nothing couples with others, and solve for `search`.
    // The factor L overwrites the lower triangle.
    auto solve_part = [&](int begin, int end) {
        for (int k = begin; k < end; ++k) {
            const float inverse = 1.0f / wp::sqrt(wp::max(ENTRY(k, k), MIN_VALUE));
            const float solved = search[k] * inverse;
            WARP_SYNC();
            if (thread == 0) {
                ENTRY(k, k) = inverse;
                search[k] = solved;
            }
            for (int i = k + 1 + thread; i < end; i += width) {
                if (first[i] > k) continue;
                ENTRY(i, k) *= inverse;
                search[i] -= ENTRY(i, k) * solved;
            }
            WARP_SYNC();
            const int left = end - k - 1;
            for (int pair = thread; pair < left * (left + 1) / 2; pair += width) {
                const int a = static_cast<int>((wp::sqrt(8.0f * pair + 1.0f) - 1.0f) * 0.5f);
                const int i = k + 1 + a, j = k + 1 + pair - a * (a + 1) / 2;
                if (first[i] <= k && first[j] <= k) ENTRY(i, j) -= ENTRY(i, k) * ENTRY(j, k);
            }
            WARP_SYNC();
        }
        for (int k = end - 1; k >= begin; --k) {
            const float solved = search[k] * ENTRY(k, k);
            WARP_SYNC();
            if (thread == 0) search[k] = solved;
            for (int j = first[k] + thread; j < k; j += width) search[j] -= ENTRY(k, j) * solved;
            WARP_SYNC();
        }
    };

    auto find_search = [&]() {
        for (int i = lane; i < nv; i += lanes) {
            search[i] = -gradient[i];
            lowest[i] = i;
            for (int row = i; row < nv; ++row) lowest[i] = wp::min(lowest[i], first[row]);
        }
        BLOCK_SYNC();
        for (int i = lane; i < nv; i += lanes) {
            next[i] = i + 1;
            while (next[i] < nv && lowest[next[i]] < next[i]) ++next[i];
        }
        BLOCK_SYNC();
        int part = 0;
        for (int begin = 0; begin < nv; begin = next[begin], ++part) {
            if (part % num_warps == warp) solve_part(begin, next[begin]);
        }
        BLOCK_SYNC();
    };

    float trace = 0.0f, unused_a = 0.0f, unused_b = 0.0f;
    for (int i = lane; i < nv; i += lanes) {
        qacc[i] = num_items > 0 ? wp::address(problem.qacc_warmstart, world, 0)[i]
                                : wp::address(problem.qacc_smooth, world, 0)[i];
        trace += M[problem.M_rowadr.data[i] + problem.M_rownnz.data[i] - 1];
    }
    sum(trace, unused_a, unused_b);
    const float scale = 1.0f / wp::max(trace, MIN_VALUE);
    BLOCK_SYNC();
    multiply_by_inertia(qacc, Ma);
    for (int item = lane; item < num_items; item += lanes) {
        const int row = item_row(item), rows = item_rows(item);
        for (int r = row; r < row + rows; ++r) residual[r] = multiply_row(r, qacc) - efc_aref[r];
    }
    evaluate_constraints();

    int iteration = 0;
    float improvement = 0.0f;
    if (num_items == 0) {
        for (int i = lane; i < nv; i += lanes) gradient[i] = Ma[i] - qfrc_smooth[i];
    }
    for (; num_items > 0; ++iteration) {
        assemble();
        float gradient_norm = 0.0f, decrement = 0.0f, search_norm = 0.0f;
        for (int i = lane; i < nv; i += lanes) gradient_norm += gradient[i] * gradient[i];
        sum(gradient_norm, decrement, search_norm);
        const bool is_flat = scale * wp::sqrt(gradient_norm) < tolerance;
        const bool is_slow = improvement > 0.0f && scale * improvement < tolerance;
        if (iteration == max_iterations || (iteration > 0 && (is_flat || is_slow))) break;

        find_search();
        multiply_by_inertia(search, Msearch);
        float slope = 0.0f, curve = 0.0f;
        decrement = search_norm = 0.0f;
        for (int i = lane; i < nv; i += lanes) {
            slope += search[i] * (Ma[i] - qfrc_smooth[i]);
            curve += search[i] * Msearch[i];
            decrement -= search[i] * gradient[i];
            search_norm += search[i] * search[i];
        }
        sum(slope, curve, decrement);
        unused_a = unused_b = 0.0f;
        sum(search_norm, unused_a, unused_b);
        if (iteration > 0 && scale * 0.5f * decrement < tolerance) break;

        for (int item = lane; item < num_items; item += lanes) {
            const int row = item_row(item), rows = item_rows(item);
            for (int r = row; r < row + rows; ++r) motion[r] = multiply_row(r, search);
        }

        // The slope grows along the line: Newton's steps towards its root, halving where they leave the bracket.
        const float smooth_slope = slope, smooth_curve = curve;
        auto evaluate = [&](float alpha, float& d1, float& d2) {
            float magnitude = 0.0f;
            d1 = d2 = 0.0f;
            evaluate_line(alpha, d1, d2, magnitude);
            sum(d1, d2, magnitude);
            d1 += smooth_slope + alpha * smooth_curve;
            d2 += smooth_curve;
            return magnitude + wp::abs(smooth_slope);
        };
        float slope_here, curve_here;
        const float magnitude = evaluate(0.0f, slope_here, curve_here);
        const float slope_at_start = slope_here;
        // What float32 cannot resolve is no slope: eight units in the last place of the sum's terms.
        const float noise = 8.0f * 1.1920929e-7f * magnitude;
        const float accepted = wp::max(wp::max(tolerance * ls_tolerance * wp::sqrt(search_norm) / scale, 1e-6f), noise);
        float alpha = 0.0f, low = 0.0f, high = -1.0f;  // high < 0: not known yet
        if (slope_at_start < -noise) {
            for (int step = 0; step < max_linesearch; ++step) {
                float candidate = alpha - slope_here / wp::max(curve_here, MIN_VALUE);
                if (candidate <= low || (high > 0.0f && candidate >= high)) {
                    candidate = high > 0.0f ? 0.5f * (low + high) : 2.0f * low + 1.0f;
                }
                if (candidate == alpha) break;
                alpha = candidate;
                evaluate(alpha, slope_here, curve_here);
                if (wp::abs(slope_here) < accepted) break;
                if (slope_here < 0.0f) {
                    low = alpha;
                } else {
                    high = alpha;
                }
            }
        }
        if (alpha == 0.0f) break;
        improvement = -alpha * slope_at_start;  // at least what was gained: the slope only grows

        for (int i = lane; i < nv; i += lanes) {
            qacc[i] += alpha * search[i];
            Ma[i] += alpha * Msearch[i];
        }
        for (int item = lane; item < num_items; item += lanes) {
            const int row = item_row(item), rows = item_rows(item);
            for (int r = row; r < row + rows; ++r) residual[r] += alpha * motion[r];
        }
        evaluate_constraints();
    }

    for (int i = lane; i < nv; i += lanes) {
        wp::address(problem.qacc, world, 0)[i] = qacc[i];
        wp::address(problem.Ma, world, 0)[i] = Ma[i];
        wp::address(problem.qfrc_constraint, world, 0)[i] = Ma[i] - qfrc_smooth[i] - gradient[i];
    }
    if (lane == 0) problem.solver_niter.data[world] = iteration;

#undef SHARED
#undef BLOCK_SYNC
#undef WARP_SYNC
#undef ADD
#undef LOWER
#undef ENTRY
