//! Target `scalar_simd`: the fast implementation against the scalar one. Pages are the same bytes, refusals the same words,
//! opened rows the same numbers, also of a damaged page; attention keeps to the bound that the codec's tests set.
//!
//! Which instruction set is fast is decided once a process; `KAKEYA_SIMD` asks for a smaller one.

use kakeya_codec::{BLOCK, Rows};

use crate::attention::Query;
use crate::common::Noise;
use crate::model::model;
use crate::page;
use crate::rows::rows;
use crate::source::Source;

/// See the top of this file.
pub fn scalar_simd(bytes: &[u8]) {
    let mut source = Source::new(bytes);
    let Some(model) = model(&mut source) else { return };
    let codec = &model.codec;
    let (layer, head) = (source.below(2), source.below(2));
    // 0..31 is valid; attention is compared near the start only, it needs all pages before.
    let block = [0, 0, 1, 2, 30, 31, 32][source.below(7)];
    let attend = source.u8();
    let (at, xor) = (usize::from(source.u16()), source.u8());
    let (k, v) = rows(&mut source, codec, (layer, head, block));
    let d = codec.shape().head_dim;

    let (mut fast, mut reference) = (vec![0xaa; codec.page_bytes()], vec![0xaa; codec.page_bytes()]);
    let sealed = codec.seal(layer, head, block, Rows::dense(&k, d), Rows::dense(&v, d), &mut fast);
    let oracle =
        codec.seal_reference(layer, head, block, Rows::dense(&k, d), Rows::dense(&v, d), &mut reference);
    // As text: an error that quotes a NaN equals no other.
    assert_eq!(format!("{sealed:?}"), format!("{oracle:?}"));
    let first = fast.iter().zip(&reference).position(|(a, b)| a != b);
    assert!(first.is_none(), "sealed pages differ at byte {first:?}");
    if sealed.is_err() {
        assert!(fast.iter().all(|byte| *byte == 0xaa), "the page changed: {sealed:?}");
        return;
    }
    page::open(codec, layer, head, &fast);
    let mut damaged = fast.clone();
    let at = at % damaged.len();
    damaged[at] ^= xor;
    page::open(codec, layer, head, &damaged);

    if block > 2 || attend & 1 == 0 {
        return;
    }
    let (mut pages, mut keys, mut values) = (Vec::new(), Vec::new(), Vec::new());
    for b in 0..=block {
        codec
            .seal(layer, head, b, Rows::dense(&k, d), Rows::dense(&v, d), &mut fast)
            .expect("it was sealed at another position");
        let (mut k, mut v) = (vec![0.0; BLOCK * d], vec![0.0; BLOCK * d]);
        codec.open_reference(layer, head, &fast, &mut k, &mut v).expect("a sealed page opens");
        pages.extend_from_slice(&fast);
        keys.extend(k);
        values.extend(v);
    }
    let factor = [1.0, 0.0, 1e-3, 30.0][usize::from(attend >> 1 & 3)];
    let mut noise = Noise(u64::from(attend));
    let q: Vec<f32> = (0..2 * d).map(|_| factor * noise.gaussian()).collect();
    let (k, v) = (&k[..d], &v[..d]);
    let query = Query { codec, layer, head, pages: &pages, q: &q, k, v };
    query.compare(&keys, &values, &query.attend().expect("sealed pages in their places"));
}
