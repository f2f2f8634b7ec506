//! Golden pages and calibration artefacts of every released format version are opened, and pages sealed again to the same
//! bytes, for ever. `SHA256SUMS` lists all of them: a file that was altered or removed is found as well.
//!
//! A page's file holds one page; its name says version, recipe and head dimension. Input, model and artefact are the deterministic
//! ones of `common`. `KAKEYA_WRITE_GOLDEN=1` writes files that are missing (a new version's), never existing ones.

mod common;

use kakeya_codec::calibration::Calibration;
use kakeya_codec::{BLOCK, Codec, Error, ModelShape, Recipe, Rows};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::path::PathBuf;

fn dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

const RECIPES: [&str; 5] = [
    "kakeya-4.6x-trellis",
    "kakeya-4.6x-lloyd-max",
    "kakeya-4.6x",
    "kakeya-6.4x-trellis",
    "kakeya-free-4.6x-trellis",
];

#[test]
fn golden_pages_open_and_seal_the_same() {
    let dir = dir();
    for d in [64, 96, 128, 256] {
        for recipe in RECIPES {
            let c = common::codec(recipe, &common::shape(d, false, d));
            // Sealed from multiples of 2^-6: the input itself then hangs on no library's sine or logarithm.
            let step = |x: f32| (x * 64.0).round() / 64.0;
            let (k, v) = common::natural_block(&c, 1, 0, 3, 42);
            let (k, v): (Vec<f32>, Vec<f32>) =
                (k.into_iter().map(step).collect(), v.into_iter().map(step).collect());
            let mut page = vec![0; c.page_bytes()];
            c.seal(1, 0, 3, Rows::dense(&k, d), Rows::dense(&v, d), &mut page).unwrap();
            let path = dir.join(format!("v2-{recipe}-d{d}.page"));
            if !path.exists() && std::env::var_os("KAKEYA_WRITE_GOLDEN").is_some() {
                std::fs::create_dir_all(&dir).unwrap();
                std::fs::write(&path, &page).unwrap();
            }
            let golden = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            assert!(golden == page, "{}: sealing gives other bytes than version 2 did", path.display());
            let (mut ko, mut vo) = (vec![0.0; BLOCK * d], vec![0.0; BLOCK * d]);
            c.open(1, 0, &golden, &mut ko, &mut vo).unwrap();
            let (ek, ev) = (common::relative(&k, &ko), common::relative(&v, &vo));
            assert!(ek < 0.25 && ev < 0.55, "{}: K {ek} V {ev}", path.display());
        }
    }
}

/// The listed files and no others, each with the bytes that it was committed with. A new version's files get new lines.
#[test]
fn golden_files_are_the_ones_that_were_committed() {
    let sums = std::fs::read_to_string(dir().join("SHA256SUMS")).unwrap();
    let mut listed = BTreeSet::from(["SHA256SUMS".to_string()]);
    for line in sums.lines() {
        let (sum, name) = line.split_once("  ").expect("as sha256sum writes it");
        let bytes = std::fs::read(dir().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        let found: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(found, sum, "{name} was altered; a golden file never is");
        listed.insert(name.to_string());
    }
    let there: BTreeSet<String> = std::fs::read_dir(dir())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(there, listed);
}

/// Every page of the folder, whatever its version, by what its name says.
#[test]
fn every_golden_page_is_opened() {
    let mut versions = BTreeSet::new();
    for entry in std::fs::read_dir(dir()).unwrap() {
        let path = entry.unwrap().path();
        let Some(name) = path.file_name().unwrap().to_str().unwrap().strip_suffix(".page") else { continue };
        let (version, rest) = name.split_once('-').unwrap();
        let (recipe, d) = rest.rsplit_once("-d").unwrap();
        let d: usize = d.parse().unwrap();
        let c = common::codec(recipe, &common::shape(d, false, d));
        let page = std::fs::read(&path).unwrap();
        assert_eq!(page[..2], [b'K', version[1..].parse().unwrap()], "{name}");
        let (mut k, mut v) = (vec![f32::NAN; BLOCK * d], vec![f32::NAN; BLOCK * d]);
        c.open(1, 0, &page, &mut k, &mut v).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(k.iter().chain(&v).all(|x| x.is_finite()), "{name}");
        versions.insert(version.to_string());
    }
    assert_eq!(versions, BTreeSet::from(["v2".to_string()]), "pages of every version that was released");
}

/// The model that `calibration-1.safetensors` is of: `kakeya calibrate` made it from the tiny random model of
/// tests/vllm/engines.py, whose rotary embedding does not matter here.
fn calibrated_model() -> ModelShape {
    ModelShape {
        num_layers: 4,
        num_kv_heads: 2,
        num_q_heads: 4,
        head_dim: 128,
        max_position: 2048,
        rope: None,
    }
}

#[test]
fn the_golden_artefact_holds_what_it_held() {
    let bytes = std::fs::read(dir().join("calibration-1.safetensors")).unwrap();
    let c = Calibration::parse(&bytes, &calibrated_model()).unwrap();
    let (first, last) = (c.head(0, 0), c.head(3, 1));
    // Bit for bit, of the first head and of the last: an artefact is read, not computed.
    let found = [
        first.k_mean[0],
        first.k_var[1],
        first.q_sq[2],
        first.q_mean[3],
        first.v_mean[4],
        first.v_var[5],
        last.k_mean[127],
        last.k_var[126],
        last.q_sq[125],
        last.q_mean[124],
        last.v_mean[123],
        last.v_var[122],
    ];
    assert_eq!(found.map(f32::to_bits), VALUES);
    assert_eq!(c.sink_mass(2, 1..3).unwrap().to_bits(), SINK_MASS);
}

/// The tables that each recipe makes of the golden artefact: pages that an engine wrote with it stay readable.
#[test]
fn the_golden_artefact_makes_the_same_tables() {
    let bytes = std::fs::read(dir().join("calibration-1.safetensors")).unwrap();
    for (recipe, fingerprint) in FINGERPRINTS {
        let c = Codec::new(&Recipe::parse(recipe).unwrap(), &calibrated_model(), Some(&bytes)).unwrap();
        assert_eq!(c.fingerprint(), fingerprint, "{recipe}");
    }
}

/// A file or page of the next version is told from a damaged one.
#[test]
fn a_later_version_is_refused_by_its_number() {
    let mut bytes = std::fs::read(dir().join("calibration-1.safetensors")).unwrap();
    let format = b"kakeya-calibration-1";
    let at = bytes.windows(format.len()).position(|w| w == format).unwrap();
    bytes[at + format.len() - 1] = b'2';
    let refused = Calibration::parse(&bytes, &calibrated_model()).unwrap_err();
    assert!(matches!(refused, Error::WrongVersion { .. }), "{refused}");
}

const VALUES: [u32; 12] = [
    0xbf5262d8, 0x3fab8dd9, 0x3fa7d51d, 0xbe1754f8, 0xbd4bd783, 0x3f909d87, 0xbf39db4d, 0x3e306208,
    0x401de314, 0xbe730b9d, 0xbf07132c, 0x3e22069b,
];
const SINK_MASS: u32 = 0x3cab661a;
const FINGERPRINTS: [(&str, &str); 4] = [
    ("kakeya-4.6x", "f48b85c33f921a123a0e88afb61139d9027c39fd84a8f484edfda6c47ff7697b"),
    ("kakeya-4.6x-trellis", "d9f32fd2579371a116bb3500d8b506664ac2a0769341e53f7c2692d833dfc283"),
    ("kakeya-4.6x-lloyd-max", "e0199f0244679e6bae908158718ea1bc265550c685ea2c043ca678c0a6af82a8"),
    ("kakeya-6.4x-trellis", "453535c5b66e012b5318e6b8a06c098049a01346517bee4dbf058677b97ad70f"),
];
