//! Writes what a GPU test of sealing needs, one file a recipe: tables, bf16 keys and values, and the codec's pages.
//! Usage: seal_vectors DIR

#[path = "../../../crates/codec/tests/common/mod.rs"]
mod common;

use half::bf16;
use kakeya_codec::device::tables;
use kakeya_codec::{BLOCK, Elements, Rows};
use std::io::Write;

const BLOCKS: usize = 12;
/// "KAKSEAL1", little-endian.
const MAGIC: u64 = 0x314c_4145_534b_414b;

fn main() -> std::io::Result<()> {
    let dir = std::env::args().nth(1).expect("usage: seal_vectors DIR");
    std::fs::create_dir_all(&dir)?;
    for d in [64, 96, 128, 256] {
        for name in ["kakeya-4.6x", "kakeya-4.6x-uniform", "kakeya-6.4x-lloyd-max", "kakeya-free-4.6x"] {
            let c = common::codec(name, &common::shape(d, d == 96, d));
            let heads = c.shape().num_kv_heads;
            let mut k = vec![bf16::ZERO; BLOCKS * BLOCK * heads * d];
            let mut v = k.clone();
            for b in 0..BLOCKS {
                for h in 0..heads {
                    let (kb, vb) = common::natural_block(&c, 1, h, b, (31 * b + h) as u64);
                    for j in 0..BLOCK {
                        for i in 0..d {
                            let at = ((b * BLOCK + j) * heads + h) * d + i;
                            k[at] = bf16::from_f32(kb[j * d + i]);
                            v[at] = bf16::from_f32(vb[j * d + i]);
                        }
                    }
                }
            }
            let t = tables(&c);
            let mut out = std::fs::File::create(format!("{dir}/{name}-d{d}.bin"))?;
            for x in [MAGIC, t.len() as u64, BLOCKS as u64, heads as u64, 1, 0] {
                out.write_all(&x.to_le_bytes())?;
            }
            out.write_all(&t)?;
            for x in [&k, &v] {
                out.write_all(&x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())?;
            }
            for b in 0..BLOCKS {
                for h in 0..heads {
                    let rows = |x| Rows {
                        data: Elements::Bf16(x),
                        start: (b * BLOCK * heads + h) * d,
                        stride: heads * d,
                    };
                    let mut page = vec![0; c.page_bytes()];
                    c.seal(1, h, b, rows(&k), rows(&v), &mut page).expect("finite input");
                    out.write_all(&page)?;
                }
            }
        }
    }
    Ok(())
}
