// Solution of (M + diag(added)) x = right for the degrees of freedom of one kinematic tree: body of a function that one
// thread enters. M is dense within a tree, so that it takes a Cholesky factor of at most SIZE rows. Rows that the tree
// does not have are those of the identity: all loops have bounds that the compiler knows, and where SIZE is small it
// unrolls them and holds the factor in registers. Unrolled for fifty degrees of freedom, they would compile for minutes.
//
// Names from outside: SIZE; the arguments of `solve_tree` in `libero_gym.physics.fused_dynamics`.

#if SIZE <= 16
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("unroll 1")
#endif
#define ENTRY(row, column) factor[(row) * ((row) + 1) / 2 + (column)]

    const int first = tree_first.data[tree], size = tree_size.data[tree], num_trees = tree_first.shape[0];
    const float* inertia = wp::address(M, world, 0);
    const float* values = wp::address(right, world, first);
    float* solution = wp::address(x, world, first);
    float factor[SIZE * (SIZE + 1) / 2], inverse[SIZE], y[SIZE];

    UNROLL
    for (int i = 0; i < SIZE; ++i) {
        y[i] = i < size ? values[i] : 0.0f;
        UNROLL
        for (int j = 0; j <= i; ++j) {
            const int adr = tree_entry.data[(i * (i + 1) / 2 + j) * num_trees + tree];
            ENTRY(i, j) = adr >= 0 ? inertia[adr] : 0.0f;
        }
        ENTRY(i, i) = i < size ? ENTRY(i, i) + scale * added.data[first + i] : 1.0f;
    }
    UNROLL
    for (int k = 0; k < SIZE; ++k) {
        const float diagonal = wp::sqrt(ENTRY(k, k));
        inverse[k] = 1.0f / diagonal;
        y[k] *= inverse[k];
        UNROLL
        for (int i = k + 1; i < SIZE; ++i) {
            ENTRY(i, k) *= inverse[k];
            y[i] -= ENTRY(i, k) * y[k];
        }
        UNROLL
        for (int i = k + 1; i < SIZE; ++i) {
            UNROLL
            for (int j = k + 1; j <= i; ++j) ENTRY(i, j) -= ENTRY(i, k) * ENTRY(j, k);
        }
    }
    UNROLL
    for (int k = SIZE - 1; k >= 0; --k) {
        y[k] *= inverse[k];
        UNROLL
        for (int j = 0; j < k; ++j) y[j] -= ENTRY(k, j) * y[k];
    }
    UNROLL
    for (int i = 0; i < SIZE; ++i) {
        if (i < size) solution[i] = y[i];
    }

#undef UNROLL
#undef ENTRY
