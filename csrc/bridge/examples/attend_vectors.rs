//! Writes what the GPU tests of attention need, one file a recipe and head_dim: tables, sealed pages, and what the codec
//! reads from them. Usage: attend_vectors DIR [BLOCKS HEADS] (default 24 2)

#[path = "../../../crates/codec/tests/common/mod.rs"]
mod common;

use kakeya_codec::device::tables;
use kakeya_codec::{BLOCK, Elements, Rows};
use std::io::Write;

/// "KAKATTN1", little-endian.
const MAGIC: u64 = 0x314e_5454_414b_414b;
const LAYER: usize = 1;

fn main() -> std::io::Result<()> {
    let mut args = std::env::args().skip(1);
    let dir = args.next().expect("usage: attend_vectors DIR [BLOCKS HEADS]");
    let mut number = |default: usize| args.next().map_or(default, |x| x.parse().expect("a number"));
    let (blocks, heads) = (number(24), number(2));
    std::fs::create_dir_all(&dir)?;
    let (uniform, trellis) = ("kakeya-4.6x", "kakeya-4.6x-trellis");
    let lloyd = "kakeya-4.6x-lloyd-max";
    for (d, rotary, names) in [
        (64, 64, vec![trellis, uniform, lloyd, "kakeya-free-4.6x-trellis"]),
        (96, 96, vec![trellis, uniform, lloyd, "kakeya-free-4.6x-trellis"]),
        (96, 48, vec![uniform]),
        (128, 128, vec![trellis, uniform, lloyd, "kakeya-free-4.6x-trellis", "kakeya-6.4x", "kakeya-4.0x"]),
        (128, 64, vec![uniform]), // partial rotary embedding
        (256, 256, vec![trellis, uniform, lloyd]),
    ] {
        for name in names {
            let mut shape = common::shape(d, false, rotary);
            shape.num_kv_heads = heads;
            shape.num_q_heads = heads;
            shape.max_position = 131_072;
            let c = common::codec(name, &shape);
            let t = tables(&c);
            let freq = &shape.rope.as_ref().expect("a rotary embedding").inv_freq;
            let mut out = std::fs::File::create(format!("{dir}/{name}-d{d}-r{rotary}.bin"))?;
            for x in [MAGIC, t.len() as u64, blocks as u64, heads as u64, LAYER as u64, freq.len() as u64] {
                out.write_all(&x.to_le_bytes())?;
            }
            out.write_all(&t)?;
            out.write_all(&freq.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())?;
            let (mut pages, mut rows) = (Vec::new(), Vec::new());
            for b in 0..blocks {
                for h in 0..heads {
                    let (kb, vb) = common::natural_block(&c, LAYER, h, b, (31 * b + h) as u64);
                    let data = |x| Rows { data: Elements::F32(x), start: 0, stride: d };
                    let mut page = vec![0; c.page_bytes()];
                    c.seal(LAYER, h, b, data(&kb), data(&vb), &mut page).expect("finite input");
                    let (mut k, mut v) = (vec![0.0; BLOCK * d], vec![0.0; BLOCK * d]);
                    c.open(LAYER, h, &page, &mut k, &mut v).expect("a sealed page");
                    pages.extend(page);
                    rows.extend(k.iter().chain(&v).flat_map(|x| x.to_le_bytes()));
                }
            }
            out.write_all(&pages)?;
            out.write_all(&rows)?;
        }
    }
    Ok(())
}
