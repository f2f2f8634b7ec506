//! Orthonormal Walsh-Hadamard transform of a row, natural (Sylvester) order. Head dimensions that are no power of two
//! (96) are transformed in blocks of the largest power of two that divides them (32).

/// Block size of the transform for a head dimension.
pub fn block(head_dim: usize) -> usize {
    1 << head_dim.trailing_zeros()
}

/// Transforms `row` in place; its own inverse. Butterflies first, one scaling at the end: the order of roundings is part
/// of the page format.
#[inline(always)]
pub fn transform(row: &mut [f32]) {
    let n = block(row.len());
    let scale = (1.0 / (n as f64).sqrt()) as f32;
    for part in row.chunks_exact_mut(n) {
        let mut len = 1;
        while len < n {
            for pair in part.chunks_exact_mut(2 * len) {
                let (lo, hi) = pair.split_at_mut(len);
                for (a, b) in lo.iter_mut().zip(hi) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            len *= 2;
        }
        for x in part {
            *x *= scale;
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn own_inverse_and_norm_preserving() {
        for d in [64, 96, 128, 256] {
            let x: Vec<f32> = (0..d).map(|i| ((i * 37 % 101) as f32 - 50.0) / 10.0).collect();
            let mut y = x.clone();
            super::transform(&mut y);
            let norm = |v: &[f32]| v.iter().map(|a| f64::from(a * a)).sum::<f64>();
            assert!((norm(&x) / norm(&y) - 1.0).abs() < 1e-5);
            super::transform(&mut y);
            assert!(x.iter().zip(&y).all(|(a, b)| (a - b).abs() < 1e-4));
        }
    }
}
