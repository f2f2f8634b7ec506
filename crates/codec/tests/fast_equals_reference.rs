//! The fast implementation against the scalar one: same bytes, same values, over every preset and head dimension.

mod common;

use kakeya_codec::{BLOCK, Recipe, Rows};

#[test]
fn bytes_and_values_are_equal() {
    for d in [64, 96, 128, 256] {
        for name in Recipe::presets() {
            let c = common::codec(&name, &common::shape(d, d == 96, if d == 256 { 64 } else { d }));
            for layer in 0..2 {
                let (k, v) = common::natural_block(&c, layer, 1, 5, d as u64 + layer as u64);
                let mut fast = vec![0xaa; c.page_bytes()];
                let mut slow = vec![0x55; c.page_bytes()];
                c.seal(layer, 1, 5, Rows::dense(&k, d), Rows::dense(&v, d), &mut fast).unwrap();
                c.seal_reference(layer, 1, 5, Rows::dense(&k, d), Rows::dense(&v, d), &mut slow).unwrap();
                assert!(
                    fast == slow,
                    "{name} D={d} layer {layer}: {:?}",
                    fast.iter().zip(&slow).position(|(a, b)| a != b)
                );
                let zero = vec![0.0; BLOCK * d];
                let (mut ka, mut va, mut kb, mut vb) = (zero.clone(), zero.clone(), zero.clone(), zero);
                c.open(layer, 1, &fast, &mut ka, &mut va).unwrap();
                c.open_reference(layer, 1, &fast, &mut kb, &mut vb).unwrap();
                assert!(ka == kb && va == vb, "{name} D={d} layer {layer}");
                let (ek, ev) = (common::relative(&k, &ka), common::relative(&v, &va));
                println!("{name} D={d} layer {layer}: K {ek:.4} V {ev:.4}");
            }
        }
    }
}
