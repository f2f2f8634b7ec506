//! Golden pages of every released format version are opened, and sealed again to the same bytes, for ever.
//!
//! A file holds one page; its name says version, recipe and head dimension. Input, model and artefact are the deterministic
//! ones of `common`. `KAKEYA_WRITE_GOLDEN=1` writes files that are missing (a new version's), never existing ones.

mod common;

use kakeya_codec::{BLOCK, Rows};
use std::path::PathBuf;

const RECIPES: [&str; 5] = [
    "kakeya-4.6x-trellis",
    "kakeya-4.6x-lloyd-max",
    "kakeya-4.6x",
    "kakeya-6.4x-trellis",
    "kakeya-free-4.6x-trellis",
];

#[test]
fn golden_pages_open_and_seal_the_same() {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
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
            let path = dir.join(format!("v1-{recipe}-d{d}.page"));
            if !path.exists() && std::env::var_os("KAKEYA_WRITE_GOLDEN").is_some() {
                std::fs::create_dir_all(&dir).unwrap();
                std::fs::write(&path, &page).unwrap();
            }
            let golden = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            assert!(golden == page, "{}: sealing gives other bytes than version 1 did", path.display());
            let (mut ko, mut vo) = (vec![0.0; BLOCK * d], vec![0.0; BLOCK * d]);
            c.open(1, 0, &golden, &mut ko, &mut vo).unwrap();
            let (ek, ev) = (common::relative(&k, &ko), common::relative(&v, &vo));
            assert!(ek < 0.25 && ev < 0.55, "{}: K {ek} V {ev}", path.display());
        }
    }
}
