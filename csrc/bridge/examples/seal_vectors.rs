//! Writes what the GPU tests of sealing need, one file a recipe: tables, keys and values in an engine's type, the codec's
//! pages, and the rows that they open to.
//! Usage: seal_vectors DIR [BLOCKS KV_HEADS HEAD_DIM]; without the three, what tests/gpu/seal.cu compares.

#[path = "../../../crates/codec/tests/common/mod.rs"]
mod common;

use half::{bf16, f16};
use kakeya_codec::device::tables;
use kakeya_codec::{BLOCK, Elements, Rows};
use std::io::Write;

/// "KAKSEAL2", little-endian.
const MAGIC: u64 = 0x324c_4145_534b_414b;
const LAYER: usize = 1;
/// (recipe, whether its elements are f16).
const RECIPES: [(&str, bool); 5] = [
    ("kakeya-4.6x-trellis", false),
    ("kakeya-4.6x", true),
    ("kakeya-6.4x-lloyd-max", false),
    ("kakeya-free-4.6x-trellis", true),
    ("kakeya-free-6.4x", false),
];

/// Elements of one type.
enum Data {
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
}

impl Data {
    fn from(x: &[f32], is_f16: bool) -> Data {
        match is_f16 {
            true => Data::F16(x.iter().map(|x| f16::from_f32(*x)).collect()),
            false => Data::Bf16(x.iter().map(|x| bf16::from_f32(*x)).collect()),
        }
    }

    fn elements(&self) -> Elements<'_> {
        match self {
            Data::Bf16(x) => Elements::Bf16(x),
            Data::F16(x) => Elements::F16(x),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        match self {
            Data::Bf16(x) => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Data::F16(x) => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
        }
    }
}

fn main() -> std::io::Result<()> {
    let mut args = std::env::args().skip(1);
    let dir = args.next().expect("usage: seal_vectors DIR [BLOCKS KV_HEADS HEAD_DIM]");
    let sizes: Vec<usize> = args.map(|x| x.parse().expect("a number")).collect();
    let (blocks, heads, dims) = match sizes[..] {
        [blocks, heads, d] => (blocks, heads, vec![d]),
        _ => (5, 2, vec![64, 96, 128, 256]),
    };
    std::fs::create_dir_all(&dir)?;
    for d in dims {
        for (name, is_f16) in RECIPES {
            let mut shape = common::shape(d, d == 96, if d == 256 { 64 } else { d });
            (shape.num_kv_heads, shape.num_q_heads) = (heads, 4 * heads);
            let c = common::codec(name, &shape);
            let mut rows = [vec![0f32; blocks * BLOCK * heads * d], vec![0f32; blocks * BLOCK * heads * d]];
            let at = |b: usize, h: usize, j: usize| ((b * BLOCK + j) * heads + h) * d;
            for b in 0..blocks {
                for h in 0..heads {
                    let (k, v) = common::natural_block(&c, LAYER, h, b, (31 * b + h) as u64);
                    for j in 0..BLOCK {
                        rows[0][at(b, h, j)..][..d].copy_from_slice(&k[j * d..][..d]);
                        rows[1][at(b, h, j)..][..d].copy_from_slice(&v[j * d..][..d]);
                    }
                }
            }
            let [k, v] = rows.map(|x| Data::from(&x, is_f16));
            let mut pages = Vec::new();
            let mut opened = [vec![0f32; blocks * BLOCK * heads * d], vec![0f32; blocks * BLOCK * heads * d]];
            for b in 0..blocks {
                for h in 0..heads {
                    let rows = |data| Rows { data, start: at(b, h, 0), stride: heads * d };
                    let mut page = vec![0; c.page_bytes()];
                    c.seal(LAYER, h, b, rows(k.elements()), rows(v.elements()), &mut page)
                        .expect("finite input");
                    let (mut ko, mut vo) = (vec![0.0; BLOCK * d], vec![0.0; BLOCK * d]);
                    c.open(LAYER, h, &page, &mut ko, &mut vo).expect("just sealed");
                    for j in 0..BLOCK {
                        opened[0][at(b, h, j)..][..d].copy_from_slice(&ko[j * d..][..d]);
                        opened[1][at(b, h, j)..][..d].copy_from_slice(&vo[j * d..][..d]);
                    }
                    pages.extend(page);
                }
            }
            let t = tables(&c);
            let mut out = std::fs::File::create(format!("{dir}/{name}-d{d}.bin"))?;
            for x in [MAGIC, t.len() as u64, blocks as u64, heads as u64, LAYER as u64, u64::from(is_f16)] {
                out.write_all(&x.to_le_bytes())?;
            }
            for x in [t, k.bytes(), v.bytes(), pages] {
                out.write_all(&x)?;
            }
            for x in opened {
                out.write_all(&Data::from(&x, is_f16).bytes())?;
            }
        }
    }
    Ok(())
}
