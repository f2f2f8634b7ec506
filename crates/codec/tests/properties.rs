//! What every page keeps to, on friendly and on hostile input.

mod common;

use common::Noise;
use half::bf16;
use kakeya_codec::grid::distortion;
use kakeya_codec::{BLOCK, Codec, Elements, Error, Recipe, Rows};
use proptest::prelude::*;

/// Mean square error that the widths of a stream promise on unit-variance Gaussian input, channel-weighted by `sigma`^2
/// (equal weights if `None`).
fn promised(c: &Codec, widths: &[u8], order: &[u16], sigma: Option<&[f32]>) -> f64 {
    let mse = distortion(c.recipe().quantizer);
    let channels = order.len() / widths.len();
    let weight = |i: u16| sigma.map_or(1.0, |s| f64::from(s[usize::from(i)]).powi(2));
    let total: f64 = order.iter().map(|&i| weight(i)).sum();
    order.iter().enumerate().map(|(p, &i)| mse[usize::from(widths[p / channels])] * weight(i)).sum::<f64>()
        / total
}

fn round_trip(c: &Codec, layer: usize, block: usize, k: &[f32], v: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let d = c.shape().head_dim;
    let mut page = vec![0; c.page_bytes()];
    c.seal(layer, 0, block, Rows::dense(k, d), Rows::dense(v, d), &mut page).unwrap();
    let (mut ko, mut vo) = (vec![f32::NAN; BLOCK * d], vec![f32::NAN; BLOCK * d]);
    c.open(layer, 0, &page, &mut ko, &mut vo).unwrap();
    assert!(ko.iter().chain(&vo).all(|x| x.is_finite()));
    (ko, vo)
}

fn rms(x: &[f32]) -> f64 {
    (x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / x.len() as f64).sqrt()
}

fn error(a: &[f32], b: &[f32]) -> f64 {
    rms(&a.iter().zip(b).map(|(a, b)| a - b).collect::<Vec<_>>())
}

/// Keys = turn(offset + noise), values = noise: a block as a model without calibration would make it.
fn block_of(
    c: &Codec,
    block: usize,
    offset: &dyn Fn(usize) -> f32,
    noise: &mut dyn FnMut() -> f32,
) -> (Vec<f32>, Vec<f32>) {
    let d = c.shape().head_dim;
    let mut k = Vec::new();
    for j in 0..BLOCK {
        let mut row: Vec<f32> = (0..d).map(|i| offset(i) + noise()).collect();
        common::turn_by(c.shape(), &mut row, (block * BLOCK + j) as f64);
        k.extend(row);
    }
    (k, (0..BLOCK * d).map(|_| noise()).collect())
}

/// Calibration-free pages measure every channel themselves: their error keeps to the widths' promise on any source whose
/// deviation is `deviation`, plus what 11 bits of mean and the smallest scale, 2^-16, leave.
fn free_bound(c: &Codec, deviation: f64, largest: f64, slack: f64) -> (f64, f64) {
    let t = c.tables(0, 0).unwrap();
    let floor = 3.0 * 2f64.powi(-16) + largest * 2f64.powi(-11);
    let bound =
        |widths: &[u8], order: &[u16]| slack * promised(c, widths, order, None).sqrt() * deviation + floor;
    (bound(&t.k.widths, &t.k.order), bound(&t.v.widths, &t.v.order))
}

fn free_names() -> impl Iterator<Item = String> {
    Recipe::presets().into_iter().filter(|n| n.contains("free"))
}

#[test]
fn gaussian_heavy_tailed_constant_zero_offset_and_denormal_input() {
    for d in [64, 128] {
        for name in free_names() {
            let c = common::codec(&name, &common::shape(d, false, d));
            let mut n = Noise(3);
            let check =
                |what: &str, (k, v): (Vec<f32>, Vec<f32>), deviation: f64, largest: f64, slack: f64| {
                    let (ko, vo) = round_trip(&c, 0, 3, &k, &v);
                    let (bk, bv) = free_bound(&c, deviation, largest, slack);
                    let (ek, ev) = (error(&k, &ko), error(&v, &vo));
                    assert!(ek <= bk && ev <= bv, "{name} D={d} {what}: K {ek} > {bk} or V {ev} > {bv}");
                };
            check("gaussian", block_of(&c, 3, &|_| 0.0, &mut || n.gaussian()), 1.0, 0.0, 1.15);
            // Ratio of Gaussians, cut at 30: a few tokens carry most of the energy, far outside any 4-bit grid. What stands
            // out most goes to the exact slots, the rest clips: a third of the signal's deviation over the promise.
            let mut n = Noise(4);
            let mut heavy = || (n.gaussian() / (n.gaussian().abs() + 1e-3)).clamp(-30.0, 30.0);
            let (k, v) = block_of(&c, 3, &|_| 0.0, &mut heavy);
            let (ko, vo) = round_trip(&c, 0, 3, &k, &v);
            let (ek, ev) = (error(&k, &ko) / rms(&k), error(&v, &vo) / rms(&v));
            let (bk, bv) = free_bound(&c, 1.0, 0.0, 1.0);
            assert!(ek < bk + 0.35 && ev < bv + 0.35, "{name} D={d} heavy-tailed: K {ek}, V {ev}");
            check("constant", block_of(&c, 3, &|i| i as f32 * 0.1, &mut || 0.0), 0.0, 0.1 * d as f64, 1.0);
            check("zero", block_of(&c, 3, &|_| 0.0, &mut || 0.0), 0.0, 0.0, 1.0);
            check("denormal", block_of(&c, 3, &|_| 1e-40, &mut || 1e-41), 0.0, 0.0, 1.0);
            let mut n = Noise(5);
            let huge = |i: usize| if i % (d / 4) == 5 { 358.0 } else { 0.0 };
            check("huge offset", block_of(&c, 3, &huge, &mut || n.gaussian()), 1.0, 30.0, 1.2);
        }
    }
}

/// Calibrated pages keep the promise, weighted by the channels' own deviations, on the calibration's own distribution.
#[test]
fn calibrated_error_is_what_the_allocation_predicts() {
    for d in [64, 96, 128, 256] {
        for name in Recipe::presets().into_iter().filter(|n| !n.contains("free")) {
            let c = common::codec(&name, &common::shape(d, false, d));
            for layer in 0..2 {
                let t = c.tables(layer, 0).unwrap();
                let (k, v) = common::natural_block(&c, layer, 0, 2, 11);
                let (ko, _) = round_trip(&c, layer, 2, &k, &v);
                let variance: f64 = t.k.sigma.iter().map(|s| f64::from(s * s)).sum::<f64>() / d as f64;
                let bound =
                    1.25 * (promised(&c, &t.k.widths, &t.k.order, Some(&t.k.sigma)) * variance).sqrt();
                let e = error(&k, &ko);
                assert!(e <= bound, "{name} D={d} layer {layer}: {e} > {bound}");
            }
        }
    }
}

/// Text unlike the calibration's, far beyond its deviations, degrades gracefully: no overflow, error below the signal.
#[test]
fn calibrated_pages_survive_what_calibration_never_saw() {
    for name in ["kakeya-4.6x", "kakeya-4.6x-trellis"] {
        let c = common::codec(name, &common::shape(128, false, 128));
        for factor in [0.0f32, 1e-30, 0.01, 8.0, 1e4] {
            let (k, v) = common::natural_block(&c, 0, 0, 1, 5);
            let scaled = |x: &[f32]| x.iter().map(|x| x * factor).collect::<Vec<_>>();
            let (k, v) = (scaled(&k), scaled(&v));
            let (ko, vo) = round_trip(&c, 0, 1, &k, &v);
            let scale = rms(&c.tables(0, 0).unwrap().k.sigma).max(1.0);
            assert!(
                error(&k, &ko) <= rms(&k) + scale && error(&v, &vo) <= rms(&v) + scale,
                "{name} x{factor}"
            );
        }
    }
}

#[test]
fn not_finite_is_refused_by_name_and_the_page_stays() {
    let c = common::codec("kakeya-free-4.6x", &common::shape(64, false, 64));
    let (k, v) = (vec![0.5; BLOCK * 64], vec![0.25; BLOCK * 64]);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e8] {
        for in_k in [true, false] {
            let (mut k, mut v) = (k.clone(), v.clone());
            (if in_k { &mut k } else { &mut v })[77 * 64 + 13] = bad;
            let mut page = vec![0x5a; c.page_bytes()];
            let e = c.seal(1, 1, 4, Rows::dense(&k, 64), Rows::dense(&v, 64), &mut page).unwrap_err();
            assert!(
                matches!(e, Error::NonFinite { stream, layer: 1, head: 1, block: 4, token: 77, channel: 13, .. }
                    if stream == if in_k { "K" } else { "V" }),
                "{e}"
            );
            assert!(page.iter().all(|b| *b == 0x5a));
        }
    }
}

#[test]
fn engine_dtypes_seal_what_they_hold() {
    let c = common::codec("kakeya-4.6x", &common::shape(64, false, 64));
    let (k, v) = common::natural_block(&c, 0, 0, 0, 9);
    let (kb, vb): (Vec<bf16>, Vec<bf16>) =
        (k.iter().map(|x| bf16::from_f32(*x)).collect(), v.iter().map(|x| bf16::from_f32(*x)).collect());
    let wide = |x: &[bf16]| x.iter().map(|x| x.to_f32()).collect::<Vec<f32>>();
    let (mut a, mut b) = (vec![0; c.page_bytes()], vec![0; c.page_bytes()]);
    let rows = |x| Rows { data: Elements::Bf16(x), start: 0, stride: 64 };
    c.seal(0, 0, 0, rows(&kb), rows(&vb), &mut a).unwrap();
    c.seal(0, 0, 0, Rows::dense(&wide(&kb), 64), Rows::dense(&wide(&vb), 64), &mut b).unwrap();
    assert_eq!(a, b);
}

/// Exact tokens: the one that stands out is held to 8 bits.
#[test]
fn outliers_get_exact_slots() {
    let c = common::codec("kakeya-free-4.6x", &common::shape(64, false, 64));
    let mut n = Noise(8);
    let (mut k, v) = block_of(&c, 0, &|_| 0.0, &mut || n.gaussian());
    for x in &mut k[31 * 64..32 * 64] {
        *x *= 50.0;
    }
    let (ko, _) = round_trip(&c, 0, 0, &k, &v);
    assert!(common::relative(&k[31 * 64..32 * 64], &ko[31 * 64..32 * 64]) < 0.01);
    assert!(error(&k[..31 * 64], &ko[..31 * 64]) < 0.2);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Opening is total: any bytes give finite values or an error, and never panic; both implementations agree.
    #[test]
    fn any_bytes_open_or_are_refused(seed in any::<u64>(), free in any::<bool>(), valid_header in any::<bool>()) {
        let name = if free { "kakeya-free-4.6x" } else { "kakeya-4.6x" };
        let c = common::codec(name, &common::shape(64, false, 64));
        let mut n = Noise(seed);
        let mut page: Vec<u8> = (0..c.page_bytes()).map(|_| (n.uniform() * 256.0) as u8).collect();
        if valid_header {
            page[..4].copy_from_slice(&[b'K', 2, 0, 1]);
            page[4..8].copy_from_slice(&3u32.to_le_bytes());
            page[8] = 5;
        }
        let z = vec![0.0; BLOCK * 64];
        let (mut k, mut v, mut k2, mut v2) = (z.clone(), z.clone(), z.clone(), z);
        let a = c.open(0, 0, &page, &mut k, &mut v);
        let b = c.open_reference(0, 0, &page, &mut k2, &mut v2);
        prop_assert_eq!(a.is_ok(), b.is_ok());
        prop_assert_eq!(a.is_ok(), valid_header);
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        if a.is_ok() && !free {
            prop_assert_eq!(bits(&k), bits(&k2));
            prop_assert_eq!(bits(&v), bits(&v2));
        }
    }

    /// Any calibration bytes are accepted or refused, in bounded time.
    #[test]
    fn damaged_artefacts_are_refused_or_harmless(at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<prop::sample::Index>(), truncate in any::<bool>()) {
        let s = common::shape(64, false, 64);
        let mut bytes = common::artefact(&s, 7);
        let i = at.index(bytes.len());
        bytes[i] = byte;
        if truncate {
            let n = cut.index(bytes.len());
            bytes.truncate(n);
        }
        let recipe = Recipe::parse("kakeya-4.6x").unwrap();
        let _ = Codec::new(&recipe, &s, Some(&bytes));
    }
}

/// Statistics that no rows of a page can have are refused by name; those at the very edge make pages that open as numbers.
#[test]
fn statistics_beyond_what_pages_hold_are_refused() {
    let s = common::shape(64, false, 64);
    let file = |name: &str, x: f32| {
        let mut bytes = common::artefact(&s, 7);
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let data = tensors.tensor(name).unwrap().data();
        let at = data.as_ptr() as usize - bytes.as_ptr() as usize;
        let n = data.len();
        x.to_le_bytes().into_iter().cycle().zip(&mut bytes[at..at + n]).for_each(|(x, b)| *b = x);
        bytes
    };
    let recipe = Recipe::parse("kakeya-4.6x-trellis").unwrap();
    let largest = 16_777_216.0f32;
    let (mean, square) = (16.0 * largest, 256.0 * largest * largest);
    for (name, edges) in [
        ("k_mean", [-mean, mean]),
        ("q_mean", [-mean, mean]),
        ("v_mean", [-mean, mean]),
        ("k_var", [0.0, square]),
        ("q_sq", [0.0, square]),
        ("v_var", [0.0, square]),
    ] {
        for edge in edges {
            let c = Codec::new(&recipe, &s, Some(&file(name, edge))).unwrap();
            let rows: Vec<f32> =
                (0..BLOCK * 64).map(|i| if i % 3 == 0 { largest } else { -largest }).collect();
            round_trip(&c, 0, 1, &rows, &rows);
        }
        for beyond in [2.0 * edges[1], f32::MAX] {
            let e = Codec::new(&recipe, &s, Some(&file(name, beyond))).unwrap_err().to_string();
            assert!(e.contains(name) && e.contains("valid: "), "{e}");
        }
    }
}

/// Finite but absurd numbers are refused by name; the largest that are accepted still seal and open to finite values.
#[test]
fn artefacts_of_any_size_of_numbers_are_refused_or_open_to_finite_values() {
    let s = common::shape(64, false, 64);
    let recipe = Recipe::parse("kakeya-4.6x").unwrap();
    let valid = common::artefact(&s, 7);
    let data = 8 + u64::from_le_bytes(valid[..8].try_into().unwrap()) as usize;
    let filled = |value: f32| {
        let mut bytes = valid.clone();
        for word in bytes[data..].chunks_exact_mut(4) {
            word.copy_from_slice(&value.to_le_bytes());
        }
        bytes
    };
    for value in [3e8f32, 1e30, f32::MAX] {
        let e = Codec::new(&recipe, &s, Some(&filled(value))).unwrap_err().to_string();
        assert!(e.contains("'k_mean' holds") && e.contains("valid: -268"), "{e}");
    }
    for value in [0.0f32, 1e-45, 1e-20, 1.0, 1e6, 2.6e8] {
        let c = Codec::new(&recipe, &s, Some(&filled(value))).unwrap();
        for size in [0.0, 1.0, 16_777_216.0] {
            let rows: Vec<f32> = (0..BLOCK * 64).map(|i| size * ((i * 37 % 3) as f32 - 1.0)).collect();
            let (k, v) = round_trip(&c, 0, 3, &rows, &rows);
            assert!(k.iter().chain(&v).all(|x| x.is_finite()), "statistics {value}, rows up to {size}");
        }
    }
}

/// What a header claims costs nothing.
#[test]
fn artefacts_with_long_headers_are_refused_before_they_are_parsed() {
    let s = common::shape(64, false, 64);
    let recipe = Recipe::parse("kakeya-4.6x").unwrap();
    for length in [(1u64 << 20) + 1, u64::MAX] {
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.resize(2 << 20, b' ');
        let e = Codec::new(&recipe, &s, Some(&bytes)).unwrap_err().to_string();
        assert!(e.contains(&format!("a header of {length} bytes")), "{e}");
    }
}

#[test]
fn artefact_of_another_model_is_refused_with_both_shapes() {
    let s = common::shape(64, false, 64);
    let mut other = s.clone();
    other.num_layers = 3;
    let e = Codec::new(&Recipe::parse("kakeya-4.6x").unwrap(), &other, Some(&common::artefact(&s, 7)))
        .unwrap_err();
    assert!(e.to_string().contains("[2, 2, 64]") && e.to_string().contains("[3, 2, 64]"), "{e}");
    let e = Codec::new(&Recipe::parse("kakeya-4.6x").unwrap(), &s, None).unwrap_err();
    assert!(e.to_string().contains("kakeya calibrate") && e.to_string().contains("kakeya-free-4.6x"), "{e}");
    let e = Codec::new(&Recipe::parse("kakeya-free-4.6x").unwrap(), &s, Some(&common::artefact(&s, 7)))
        .unwrap_err();
    assert!(e.to_string().contains("takes no calibration"), "{e}");
}

/// A page's bytes never depend on what was in memory or on the position of the call, only on its arguments.
#[test]
fn sealing_is_a_pure_function() {
    let c = common::codec("kakeya-5.3x", &common::shape(64, false, 64));
    let (k, v) = common::natural_block(&c, 1, 0, 7, 1);
    let seal = |fill: u8, block: usize| {
        let mut page = vec![fill; c.page_bytes()];
        c.seal(1, 0, block, Rows::dense(&k, 64), Rows::dense(&v, 64), &mut page).unwrap();
        page
    };
    assert_eq!(seal(0, 7), seal(0xff, 7));
    assert_ne!(seal(0, 7), seal(0, 8));
}
