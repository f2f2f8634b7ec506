//! The soft cap of scores as the attention kernels take it, whose exponentials and quotients are the host's here.

use kakeya_bridge::tanh_of;

/// Relative, so that scores far below a large cap stay what they are.
#[test]
fn tanh_is_accurate() {
    // 1e-30 to 1e30, sixteen steps an octave, and close to where the series ends.
    let sizes = (-1600..1600).map(|i| (f64::from(i) / 16.0).exp2() as f32);
    let seam = (-100..=100).map(|i| 0.125 + 1e-6 * i as f32);
    for x in sizes.chain(seam).flat_map(|x| [x, -x]) {
        let (got, want) = (f64::from(tanh_of(x)), f64::from(x).tanh());
        assert!((got / want - 1.0).abs() < 2e-6, "{x}: {got} {want}");
    }
}

#[test]
fn tanh_of_zero_and_infinity() {
    assert_eq!(tanh_of(0.0), 0.0);
    assert_eq!(tanh_of(f32::INFINITY), 1.0);
    assert_eq!(tanh_of(f32::NEG_INFINITY), -1.0);
    assert!(tanh_of(f32::NAN).is_nan());
}
