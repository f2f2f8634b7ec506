//! libkakeya as a stranger meets it: the built shared library, loaded at run time. Only the argument structs are
//! taken from this crate; every call goes through the loaded file.

#[path = "support/stranger.rs"]
mod stranger;

use std::collections::BTreeSet;
use std::ptr::{null, null_mut};

use kakeya::kakeya_status::{self, *};
use kakeya::{kakeya_page_layout, kakeya_seal_args};
use object::Object;
use stranger::{D, HEADS, Library, MODEL, noise, text};

const RECIPE: &str = "kakeya-free-4.6x";

fn seal_args(k: &[f32], v: &[f32], pages: &mut [u8]) -> kakeya_seal_args {
    kakeya_seal_args {
        struct_size: size_of::<kakeya_seal_args>() as u32,
        layer: 1,
        first_head: 0,
        num_heads: HEADS as u32,
        dtype: 2,
        block_index: 3,
        k: k.as_ptr().cast(),
        v: v.as_ptr().cast(),
        k_token_stride: (HEADS * D) as i64,
        k_head_stride: D as i64,
        v_token_stride: (HEADS * D) as i64,
        v_head_stride: D as i64,
        page_head_stride: (pages.len() / HEADS) as i64,
        pages: pages.as_mut_ptr(),
    }
}

#[test]
fn versions_are_what_the_crate_says() {
    let library = Library::load();
    // SAFETY: no arguments; the texts are static.
    unsafe {
        assert_eq!(library.get::<extern "C" fn() -> u32>("kakeya_abi_version")(), kakeya::KAKEYA_ABI_VERSION);
        assert_eq!(text(library.get("kakeya_version")), env!("CARGO_PKG_VERSION"));
        assert!(["portable", "avx2", "avx512"].contains(&text(library.get("kakeya_simd")).as_str()));
        assert_eq!(text(library.get("kakeya_last_error")), "");
    }
}

/// Nothing but the functions of the header leaves the library, and all of them do.
#[test]
fn symbols_are_those_of_the_header() {
    let header = include_str!("../../../csrc/include/kakeya.h");
    let declared: BTreeSet<String> = header
        .lines()
        .filter(|line| !line.starts_with([' ', '/', '#', '}']))
        .filter_map(|line| line.split_once('('))
        .filter_map(|(before, _)| before.rsplit([' ', '*']).next())
        .filter(|name| name.starts_with("kakeya_"))
        .map(str::to_owned)
        .collect();
    assert_eq!(declared.len(), 31, "functions of ABI 1: {declared:?}");

    let file = std::fs::read(stranger::library_path()).unwrap();
    let exports: BTreeSet<String> = object::File::parse(&*file)
        .unwrap()
        .exports()
        .unwrap()
        .iter()
        .map(|export| String::from_utf8(export.name().to_vec()).unwrap())
        .collect();
    assert_eq!(exports, declared);
}

#[test]
fn pages_are_those_of_the_codec_crate() {
    let library = Library::load();
    let codec = library.codec(RECIPE, &[]).unwrap();
    let direct = kakeya_codec::Codec::new(
        &kakeya_codec::Recipe::parse(RECIPE).unwrap(),
        &kakeya_codec::ModelShape::from_json(MODEL).unwrap(),
        None,
    )
    .unwrap();
    let page_bytes = direct.page_bytes();
    let (k, v) = (noise(1, 128 * HEADS * D), noise(2, 128 * HEADS * D));
    let mut pages = vec![0xa5; HEADS * page_bytes];
    assert_eq!(library.seal(codec, &seal_args(&k, &v, &mut pages)), KAKEYA_OK, "{}", library.last_error());

    for head in 0..HEADS {
        let rows = |x| kakeya_codec::Rows {
            data: kakeya_codec::Elements::F32(x),
            start: head * D,
            stride: HEADS * D,
        };
        let mut page = vec![0; page_bytes];
        direct.seal(1, head, 3, rows(&k), rows(&v), &mut page).unwrap();
        assert_eq!(page, pages[head * page_bytes..][..page_bytes], "page of head {head}");

        let (mut k_abi, mut v_abi) = (vec![0.0; 128 * D], vec![0.0; 128 * D]);
        let (mut k_direct, mut v_direct) = (k_abi.clone(), v_abi.clone());
        let status = library.open(codec, 1, head as u32, &page, &mut k_abi, &mut v_abi);
        assert_eq!(status, KAKEYA_OK, "{}", library.last_error());
        direct.open(1, head, &page, &mut k_direct, &mut v_direct).unwrap();
        assert_eq!(k_abi, k_direct);
        assert_eq!(v_abi, v_direct);
    }
    library.free(codec);
}

#[test]
fn refusals_say_why_and_write_nothing() {
    let library = Library::load();
    let codec = library.codec(RECIPE, &[]).unwrap();
    let (mut k, v) = (noise(1, 128 * HEADS * D), noise(2, 128 * HEADS * D));
    k[7] = f32::NAN;
    let mut pages = vec![0xa5; HEADS * library.page_bytes(codec)];
    let canary = pages.clone();
    let good = seal_args(&k, &v, &mut pages);
    let cases: [(kakeya_seal_args, kakeya_status, &str); 6] = [
        (kakeya_seal_args { struct_size: 87, ..good }, KAKEYA_ERR_BAD_STRUCT_SIZE, "args->struct_size is 87"),
        (kakeya_seal_args { layer: 2, ..good }, KAKEYA_ERR_OUT_OF_RANGE, "layer is 2; valid: 0..=1"),
        (kakeya_seal_args { dtype: 9, ..good }, KAKEYA_ERR_BAD_DTYPE, "dtype is 9"),
        (kakeya_seal_args { v: null(), ..good }, KAKEYA_ERR_NULL_POINTER, "v is NULL"),
        (kakeya_seal_args { k_token_stride: i64::MAX, ..good }, KAKEYA_ERR_OVERFLOW, "k"),
        (good, KAKEYA_ERR_NON_FINITE, "token 0, channel 7"),
    ];
    for (args, status, part) in cases {
        assert_eq!(library.seal(codec, &args), status, "{}", library.last_error());
        assert!(library.last_error().contains(part), "{}", library.last_error());
        assert_eq!(pages, canary);
    }
    assert_eq!(library.seal(null(), &good), KAKEYA_ERR_NULL_POINTER);
    library.free(codec);
    library.free(null_mut());
}

#[test]
fn the_layout_is_that_of_the_codec_crate() {
    let library = Library::load();
    let codec = library.codec(RECIPE, &[]).unwrap();
    // SAFETY: all-zero is a value of a struct of integers.
    let mut layout: kakeya_page_layout = unsafe { std::mem::zeroed() };
    layout.struct_size = size_of::<kakeya_page_layout>() as u32;
    // SAFETY: the signature is the one of the header; codec and layout live.
    let status = unsafe {
        library.get::<unsafe extern "C" fn(_, u32, *mut kakeya_page_layout) -> kakeya_status>(
            "kakeya_codec_page_layout",
        )(codec.cast_const(), 1, &mut layout)
    };
    assert_eq!(status, KAKEYA_OK, "{}", library.last_error());
    assert_eq!(layout.page_bytes as usize, library.page_bytes(codec));
    assert_eq!((layout.block_tokens, layout.head_dim as usize, layout.layer), (128, D, 1));
    library.free(codec);
}

/// Another ABI, another page format, another artefact format, another recipe: each is told from the others.
#[test]
fn other_versions_and_recipes_are_told_apart() {
    let library = Library::load();
    // SAFETY: the signature is the one of the header.
    let require: extern "C" fn(u32) -> kakeya_status = unsafe { library.get("kakeya_require_abi") };
    assert_eq!(require(kakeya::KAKEYA_ABI_VERSION), KAKEYA_OK);
    for version in [0, kakeya::KAKEYA_ABI_VERSION + 1, u32::MAX] {
        assert_eq!(require(version), KAKEYA_ERR_WRONG_VERSION);
        assert!(library.last_error().contains(&format!("version {version}")), "{}", library.last_error());
    }

    let codec = library.codec(RECIPE, &[]).unwrap();
    let (k, v) = (noise(1, 128 * HEADS * D), noise(2, 128 * HEADS * D));
    let mut pages = vec![0; HEADS * library.page_bytes(codec)];
    assert_eq!(library.seal(codec, &seal_args(&k, &v, &mut pages)), KAKEYA_OK);
    let mut page = pages[..pages.len() / HEADS].to_vec();
    page[1] = 3; // the format version
    let (mut k, mut v) = (vec![7.0; 128 * D], vec![7.0; 128 * D]);
    assert_eq!(library.open(codec, 1, 0, &page, &mut k, &mut v), KAKEYA_ERR_WRONG_VERSION);
    assert_eq!(library.last_error(), "page: format version is '3', expected '2'");
    page[0] = b'X'; // no page at all
    assert_eq!(library.open(codec, 1, 0, &page, &mut k, &mut v), KAKEYA_ERR_BAD_PAGE);
    assert!(k.iter().chain(&v).all(|x| *x == 7.0));

    let mut artefact = stranger::artefact();
    let at = artefact.windows(20).position(|bytes| bytes == b"kakeya-calibration-1").unwrap();
    artefact[at + 19] = b'2';
    assert_eq!(library.codec("kakeya-4.6x", &artefact).unwrap_err(), KAKEYA_ERR_WRONG_VERSION);
    artefact[at] = b'x';
    assert_eq!(library.codec("kakeya-4.6x", &artefact).unwrap_err(), KAKEYA_ERR_BAD_CALIBRATION);

    // Same model and page size, another quantiser.
    let other = library.codec("kakeya-free-4.6x-trellis", &[]).unwrap();
    assert_eq!(library.page_bytes(codec), library.page_bytes(other));
    let (mine, theirs) = (library.fingerprint(codec), library.fingerprint(other));
    assert_eq!(library.require_fingerprint(codec, &mine), KAKEYA_OK);
    assert_eq!(library.require_fingerprint(codec, &theirs), KAKEYA_ERR_WRONG_RECIPE);
    assert!(library.last_error().contains(&mine) && library.last_error().contains(&theirs));
    assert_eq!(library.require_fingerprint(codec, ""), KAKEYA_ERR_WRONG_RECIPE);
    library.free(codec);
    library.free(other);
}

/// Any bytes are a page, BAD_PAGE or WRONG_VERSION; none are a crash or a bug.
#[test]
fn hostile_pages_are_opened_or_refused() {
    let library = Library::load();
    let codec = library.codec(RECIPE, &[]).unwrap();
    let (k, v) = (noise(1, 128 * HEADS * D), noise(2, 128 * HEADS * D));
    let mut pages = vec![0; HEADS * library.page_bytes(codec)];
    assert_eq!(library.seal(codec, &seal_args(&k, &v, &mut pages)), KAKEYA_OK);
    let good = &pages[..pages.len() / HEADS];
    let (mut k, mut v) = (vec![0.0; 128 * D], vec![0.0; 128 * D]);
    let mut random = stranger::Random(7);
    for round in 0..2000 {
        let mut page = good.to_vec();
        match round % 3 {
            // Everything but the magic number, everything, a few bytes of the header.
            0 => page[2..].iter_mut().for_each(|byte| *byte = random.next() as u8),
            1 => page.iter_mut().for_each(|byte| *byte = random.next() as u8),
            _ => (0..3).for_each(|_| page[random.next() as usize % 16] = random.next() as u8),
        }
        let status = library.open(codec, 1, 0, &page, &mut k, &mut v);
        let taken = [KAKEYA_OK, KAKEYA_ERR_BAD_PAGE, KAKEYA_ERR_WRONG_VERSION].contains(&status);
        assert!(taken, "{status:?}: {}", library.last_error());
    }
    library.free(codec);
}

/// Any recipe, model or artefact is taken or refused; none is a bug.
#[test]
fn hostile_texts_and_artefacts_are_taken_or_refused() {
    let library = Library::load();
    let artefact = stranger::artefact();
    let codec = library.codec("kakeya-4.6x", &artefact).unwrap();
    library.free(codec);
    let recipe = r#"{"base":"kakeya-4.6x","ratio":4.6,"quantizer":"trellis","min_slots":1,"menu":16}"#;
    let mut random = stranger::Random(11);
    // JSON's own characters find more ways through a parser than noise does.
    let alphabet = b"{}[]\",:0123456789.-+eE \0\xfftruefalsn";
    let mut spoil = |bytes: &[u8], within: usize| {
        let mut bytes = bytes.to_vec();
        for _ in 0..1 + random.next() % 3 {
            let at = random.next() as usize % within.min(bytes.len());
            bytes[at] = alphabet[random.next() as usize % alphabet.len()];
        }
        bytes
    };
    for round in 0..600 {
        let (mut r, mut m, mut c) = (recipe.as_bytes().to_vec(), MODEL.as_bytes().to_vec(), artefact.clone());
        match round % 3 {
            0 => r = spoil(&r, usize::MAX),
            1 => m = spoil(&m, usize::MAX),
            _ => c = spoil(&c, 512), // length and JSON header of the safetensors file
        }
        match library.codec_of_bytes(&r, &m, &c) {
            Ok(codec) => library.free(codec),
            Err(status) => assert_ne!(status, KAKEYA_ERR_PANIC, "{}", library.last_error()),
        }
    }
}
