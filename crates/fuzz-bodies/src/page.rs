//! Target `page`: any bytes as a page. Both implementations open it to the same values or refuse it in the same words, and
//! attention over it gives a result or an error; outputs stay as they were where there is an error.

use kakeya_codec::layout::HEADER;
use kakeya_codec::{BLOCK, Codec};

use crate::attention::Query;
use crate::common::Noise;
use crate::model::model;
use crate::same;
use crate::source::Source;

/// See the top of this file.
pub fn page(bytes: &[u8]) {
    let mut source = Source::new(bytes);
    let Some(model) = model(&mut source) else { return };
    let codec = &model.codec;
    let (layer, head) = (source.below(2), source.below(2));
    let how = source.u8();
    let page = bytes_of_page(codec, how, source.rest());
    open(codec, layer, head, &page);
    if page.len() == codec.page_bytes() {
        let d = codec.shape().head_dim;
        let mut noise = Noise(u64::from(how));
        let x: Vec<f32> = (0..4 * d).map(|_| noise.gaussian()).collect();
        let (q, rest) = x.split_at(2 * d);
        let (k, v) = rest.split_at(d);
        // Block 0 of the sequence, whatever the page says about itself.
        let _ = Query { codec, layer, head, pages: &page, q, k, v }.attend();
    }
}

/// The page that `given` stands for. Bit 0 of `how`: exactly those bytes, of any length. Else they are repeated to the length
/// of a page; bit 1: behind a header that is valid but for its slots.
fn bytes_of_page(codec: &Codec, how: u8, given: &[u8]) -> Vec<u8> {
    if how & 1 == 1 {
        return given.to_vec();
    }
    let mut page: Vec<u8> = given.iter().copied().cycle().take(codec.page_bytes()).collect();
    page.resize(codec.page_bytes(), 0);
    if how & 2 == 2 {
        page[..3].copy_from_slice(&[b'K', 2, 0]);
        page[3] %= 9;
        page[4..8].copy_from_slice(&u32::from(how >> 4 & 1).to_le_bytes());
        page[8..HEADER].iter_mut().for_each(|token| *token &= 127);
    }
    page
}

/// Opens a page by both implementations and compares.
pub fn open(codec: &Codec, layer: usize, head: usize, page: &[u8]) {
    let n = BLOCK * codec.shape().head_dim;
    let mut rows = [vec![7.0; n], vec![7.0; n], vec![7.0; n], vec![7.0; n]];
    let [k, v, k_reference, v_reference] = &mut rows;
    let fast = codec.open(layer, head, page, k, v);
    let reference = codec.open_reference(layer, head, page, k_reference, v_reference);
    assert_eq!(fast, reference);
    assert!(same(k, k_reference) && same(v, v_reference), "opened values differ");
    if fast.is_err() {
        assert!(rows.iter().flatten().all(|x| *x == 7.0), "outputs changed: {fast:?}");
    }
}
