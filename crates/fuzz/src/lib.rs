//! The fuzz targets of `fuzz/`: each is a function of arbitrary bytes that panics where a promise is broken.
//!
//! | target | promise |
//! |---|---|
//! | [`recipe`] | any text is a recipe or an error; a recipe written out again means the same |
//! | [`calibration`] | any bytes are an artefact or an error; what is accepted makes a codec that seals and opens |
//! | [`page`] | any bytes are a page or an error, for the scalar reference, the fast path and the device code alike |
//! | [`abi`] | any arguments over real memory give a status; an error leaves every byte as it was |
//! | [`scalar_simd`] | sealing and opening by both implementations give the same bytes and values |
//! | [`device`] | the kernels' device code, compiled for the host, gives the codec's bytes and values |
//!
//! `tests/replay.rs` runs all of them over `fuzz/corpus` and `fuzz/crashes` with a stable compiler.

mod abi;
mod input;
mod models;

pub use abi::abi;
use input::Input;
use kakeya_codec::calibration::Calibration;
use kakeya_codec::step::{AttendArgs, Pages, attend};
use kakeya_codec::{BLOCK, Codec, Elements, ElementsMut, Recipe, Rows, Tensor};
use models::{Model, words};
pub use models::{artefact, models, shape};

/// A target and its name: of its file in `fuzz/fuzz_targets` and its directories of inputs.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 6] = [
    ("recipe", recipe),
    ("calibration", calibration),
    ("page", page),
    ("abi", abi),
    ("scalar_simd", scalar_simd),
    ("device", device),
];

/// Text as a recipe: parsed, written out, parsed again, and made a codec of.
pub fn recipe(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(parsed) = Recipe::parse(text) else { return };
    let mut written = parsed.to_json();
    // What it says beside the fields of a recipe file.
    written.as_object_mut().expect("an object").remove("needs_calibration");
    written["base"] = "kakeya-4.6x".into();
    let again = Recipe::parse(&written.to_string()).expect("a recipe written out is a recipe");
    assert_eq!(parsed.to_json(), again.to_json());
    for head_dim in [0, 1, 7, 16, 64, 96, 128, 256, 4096] {
        assert_eq!(parsed.page_bytes(head_dim).ok(), again.page_bytes(head_dim).ok());
    }
    for head_dim in [64, 96, 128] {
        let s = shape(head_dim);
        let made = artefact(&s, 7);
        let Ok(codec) = Codec::new(&parsed, &s, parsed.calibrated.then_some(&made[..])) else { continue };
        assert_eq!(codec.page_bytes(), parsed.page_bytes(head_dim).unwrap());
        for layer in 0..s.num_layers {
            codec.page_layout(layer).expect("a codec has a layout for each layer");
        }
    }
}

/// Bytes as a calibration artefact; one that is accepted must make a codec whose pages open again.
pub fn calibration(bytes: &[u8]) {
    let s = shape(64);
    if Calibration::parse(bytes, &s).is_err() {
        return;
    }
    for name in ["kakeya-4.6x", "kakeya-4.6x-trellis"] {
        let Ok(codec) = Codec::new(&Recipe::parse(name).unwrap(), &s, Some(bytes)) else { continue };
        let rows: Vec<f32> = (0..BLOCK * 64).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.1).collect();
        let mut page = vec![0; codec.page_bytes()];
        let (mut k, mut v) = (vec![0.0; BLOCK * 64], vec![0.0; BLOCK * 64]);
        codec.seal(1, 1, 3, Rows::dense(&rows, 64), Rows::dense(&rows, 64), &mut page).expect("finite rows");
        codec.open(1, 1, &page, &mut k, &mut v).expect("a page that was just sealed");
        let finite = |x: &[f32]| x.iter().all(|x| x.is_finite());
        assert!(finite(&k) && finite(&v), "an accepted artefact gave values that are not finite");
    }
}

/// Bytes as a page, of their own length or over a valid page.
pub fn page(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let model = input.pick(models());
    let (c, d) = (&model.codec, model.codec.shape().head_dim);
    let (layer, head) = (input.below(2), input.below(2));
    let block = if input.rarely(2) { 0 } else { input.below(c.shape().max_blocks()) };
    let page = if input.below(8) == 0 {
        input.rest().to_vec()
    } else {
        let mut page = model.sealed[layer].clone();
        page[4..8].copy_from_slice(&(block as u32).to_le_bytes());
        while !input.is_empty() {
            let at = input.below(page.len());
            page[at] = input.byte();
        }
        page
    };
    let zero = vec![0.0f32; BLOCK * d];
    let (mut ka, mut va, mut kb, mut vb) = (zero.clone(), zero.clone(), zero.clone(), zero);
    let fast = c.open(layer, head, &page, &mut ka, &mut va);
    let slow = c.open_reference(layer, head, &page, &mut kb, &mut vb);
    assert_eq!(fast, slow);
    if fast.is_ok() {
        assert!(same(&ka, &kb) && same(&va, &vb), "the fast path opens other values");
    }
    if page.len() != c.page_bytes() {
        assert!(fast.is_err(), "a page of {} bytes was opened, a page has {}", page.len(), c.page_bytes());
        return;
    }
    kakeya_bridge::open(&model.tables, layer as u32, head as u32, &page, &mut ka, &mut va).unwrap();
    if fast.is_ok() {
        assert!(same(&ka, &kb) && same(&va, &vb), "the device code opens other values");
    } else {
        assert!(ka.iter().chain(&va).all(|x| x.is_nan()), "the device code opens what is no page");
    }
    look(model, layer, &page, fast.is_ok());
}

/// One query behind one page: attention reads the page if it opens and says that it is the first of its sequence.
fn look(model: &Model, layer: usize, page: &[u8], opens: bool) {
    let (c, s) = (&model.codec, model.codec.shape());
    let (d, size) = (s.head_dim, page.len());
    let pages = page.repeat(2 * s.num_kv_heads);
    let q = vec![0.01f32; s.num_q_heads * d];
    let row = vec![0.02f32; s.num_kv_heads * d];
    let open = vec![0.0f32; 2 * s.num_kv_heads * BLOCK * d];
    let mut out = vec![f32::NAN; q.len()];
    let tensor = |data, stride| Tensor { data: Elements::F32(data), token_stride: stride, head_stride: d };
    let result = attend(
        c,
        &mut AttendArgs {
            layer,
            first_head: 0,
            num_kv_heads: s.num_kv_heads,
            num_q_heads: s.num_q_heads,
            num_tokens: 1,
            scale: 0.125,
            sealed_prefill: false,
            q: tensor(&q, q.len()),
            k: tensor(&row, row.len()),
            v: tensor(&row, row.len()),
            out: ElementsMut::F32(&mut out),
            out_token_stride: q.len(),
            out_head_stride: d,
            query_start: &[0, 1],
            seq_lens: &[BLOCK as i32 + 1],
            block_table: &[0, 1],
            block_table_stride: 2,
            max_blocks_per_seq: 2,
            pages: Pages {
                bytes: &pages,
                num_blocks: 2,
                block_stride: s.num_kv_heads * size,
                head_stride: size,
            },
            open_blocks: Elements::F32(&open),
            num_open: 1,
            open_slot: &[-1, 0],
            lse: None,
        },
    );
    let first = page[4..8] == [0; 4];
    assert_eq!(result.is_ok(), opens && first, "{result:?}");
    if result.is_err() {
        assert!(out.iter().all(|x| x.is_nan()), "a refused call wrote");
    }
}

/// Rows of any finite or not finite values through both implementations.
pub fn scalar_simd(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let model = input.pick(models());
    let (c, d) = (&model.codec, model.codec.shape().head_dim);
    let (layer, head, block) = (input.below(2), input.below(2), input.below(c.shape().max_blocks()));
    let (k, v) = (input.rows(BLOCK * d), input.rows(BLOCK * d));
    let (mut fast, mut slow) = (vec![0xaa; c.page_bytes()], vec![0x55; c.page_bytes()]);
    let a = c.seal(layer, head, block, Rows::dense(&k, d), Rows::dense(&v, d), &mut fast);
    let b = c.seal_reference(layer, head, block, Rows::dense(&k, d), Rows::dense(&v, d), &mut slow);
    // By text: an error may hold the NaN that it names, which equals nothing.
    let text = |r: &kakeya_codec::Result<()>| r.as_ref().err().map(ToString::to_string);
    assert_eq!(text(&a), text(&b));
    if a.is_err() {
        assert!(fast.iter().all(|x| *x == 0xaa) && slow.iter().all(|x| *x == 0x55), "a refused call wrote");
        return;
    }
    assert!(fast == slow, "byte {:?} differs", fast.iter().zip(&slow).position(|(a, b)| a != b));
    let zero = vec![0.0f32; BLOCK * d];
    let (mut ka, mut va, mut kb, mut vb) = (zero.clone(), zero.clone(), zero.clone(), zero);
    c.open(layer, head, &fast, &mut ka, &mut va).unwrap();
    c.open_reference(layer, head, &slow, &mut kb, &mut vb).unwrap();
    assert!(same(&ka, &kb) && same(&va, &vb), "opened values differ");
    assert!(ka.iter().chain(&va).all(|x| x.is_finite()), "finite rows open as values that are not");
}

/// The same rows through the device code.
pub fn device(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let model = input.pick(models());
    let (c, d) = (&model.codec, model.codec.shape().head_dim);
    let (layer, head, block) = (input.below(2), input.below(2), input.below(c.shape().max_blocks()));
    let (k, v) = (input.rows(BLOCK * d), input.rows(BLOCK * d));
    let (mut ours, mut theirs) = (vec![0xaa; c.page_bytes()], vec![0x55; c.page_bytes()]);
    let a = c.seal(layer, head, block, Rows::dense(&k, d), Rows::dense(&v, d), &mut ours);
    let place = (layer as u32, head as u32, block as u32);
    let b = kakeya_bridge::seal(&model.tables, place.0, place.1, place.2, &k, &v, &mut theirs).unwrap();
    assert_eq!(a.is_ok(), b, "{a:?}");
    if a.is_err() {
        return;
    }
    assert!(ours == theirs, "byte {:?} differs", ours.iter().zip(&theirs).position(|(a, b)| a != b));
}

/// Equal bit for bit, but for which NaN.
fn same(a: &[f32], b: &[f32]) -> bool {
    a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()))
}

/// Used by [`models`].
fn tables_of(codec: &Codec) -> Vec<u64> {
    words(&kakeya_codec::device::tables(codec))
}
