//! A codec's static tables as one block of bytes for a device. `kernels/tables.cuh` declares the same layout; offsets are
//! counted in bytes from the block's start, every table begins at a multiple of 16.

use crate::codec::{Codec, StreamTables};
use crate::fragments;
use crate::grid::{Grid, MAX_WIDTH, even_step};
use crate::recipe::Quantizer;
use crate::shape::BLOCK;

/// Thresholds reserved for each width: the trellis of width 6 has 4 x 31.
pub const MAX_THRESHOLDS: usize = 128;
/// Units reserved for each stream: head_dim 256 has 8.
pub const MAX_UNITS: usize = 8;

/// Scalars and offsets; `kakeya::Tables` in `kernels/tables.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Header {
    pub head_dim: u32,
    pub num_kv_heads: u32,
    pub num_layers: u32,
    pub pairs: u32,
    pub max_blocks: u32,
    pub page_bytes: u32,
    pub unit_channels: u32,
    pub unit_tokens: u32,
    pub calibrated: u32,
    pub trellis: u32,
    pub scale_codes: u32,
    /// Bytes from one head's record to the next.
    pub head_stride: u32,
    /// u32 `[num_layers][4]`: code bits, slots, offset of the statistics, offset of the slots in a page.
    pub layers: u32,
    /// Records `[num_layers][num_kv_heads]`; see [`tables`].
    pub heads: u32,
    /// u16 `[head_dim]`: natural channel of each canonical one.
    pub natural: u32,
    /// f32 `[max_blocks][pairs]`.
    pub centre_cos: u32,
    pub centre_sin: u32,
    /// f32 `[128][pairs]`.
    pub offset_cos: u32,
    pub offset_sin: u32,
    /// f32 `[scale_codes]`, and the thresholds between them.
    pub factors: u32,
    pub scale_thresholds: u32,
    /// By width 0..=6: f32 alpha, f32 beta, u32 thresholds a subset (scalar: in all), u32 symbol bits.
    pub grids: u32,
    /// f32 `[7][MAX_THRESHOLDS]`.
    pub thresholds: u32,
    pub total_bytes: u32,
    /// Whether the pairs that rotate are neighbours in natural order.
    pub interleaved: u32,
    /// What sealing copies as it is: `kakeya::SealTables` (see `seal_tables`), and u32 `[64][head_dim / 2 + 4]`, f16 cos
    /// (low half) and sin of the turns by 0.5..63.5 tokens, `pairs` of them in a row.
    pub seal: u32,
    pub turns: u32,
    /// What attention reads: see [`crate::fragments`].
    pub offsets: u32,
    /// Records `[num_layers][num_kv_heads]`, and bytes from one to the next.
    pub attend: u32,
    pub attend_stride: u32,
}

/// Slots of a trellis' windows, of all widths: 2^(w+1) - 3 each.
const WINDOWS: usize = 234;
/// Codes of a channel's scale at most.
const MAX_SCALES: usize = 256;
/// Eight channels each: groups of a head's key channels that count for the scores.
const MAX_ACTIVE: usize = 32;

/// Where the cells of an alphabet of `symbol_bits` bits lie: scale, count, origin. Input z is in cell
/// `round(count * clamp(z * scale + 1/2, 0, 1) + origin) - 2^23`.
fn cells_of(g: &Grid) -> [f32; 3] {
    let first = 4 << g.symbol_bits;
    [0.5 / (g.alpha + g.beta), (first - 2) as f32, 8_388_608.0 + first as f32]
}

fn cell_of([scale, count, origin]: [f32; 3], z: f32) -> usize {
    (z.mul_add(scale, 0.5).clamp(0.0, 1.0).mul_add(count, origin).to_bits() - 0x4b00_0000) as usize
}

/// `kakeya::SealTables` of kernels/seal.cuh, in its order: points or windows, cells, where cells lie, factors, thresholds
/// of scales.
fn seal_tables(codec: &Codec) -> Vec<u8> {
    let trellis = codec.recipe().quantizer == Quantizer::Trellis;
    let mut points = vec![0f32; 4 * WINDOWS];
    // An empty cell: no threshold, and none below.
    let mut cells = [(f32::INFINITY, 0u32); 1024];
    let mut places = [[0f32; 3]; MAX_UNITS];
    for (width, g) in codec.grids.iter().enumerate().skip(1) {
        let bits = g.symbol_bits as usize;
        if trellis {
            let first = (2 << width) - 3 * width - 1;
            for n in 0..(2 << width) - 3 {
                for j in 0..4 {
                    points[4 * (first + n) + j] = g.points[(n + 3 - j) / 4 * 4 + j];
                }
            }
        } else {
            points[1 << width..][..1 << width].copy_from_slice(&g.points);
        }
        let mut thresholds = g.thresholds.clone();
        thresholds.sort_by(f32::total_cmp);
        places[bits] = cells_of(g);
        let first = 4 << bits;
        for (cell, out) in cells.iter_mut().enumerate().skip(first).take(first) {
            let below = thresholds.partition_point(|&t| cell_of(places[bits], t) < cell);
            let own = thresholds.get(below).filter(|&&t| cell_of(places[bits], t) == cell);
            assert!(
                thresholds.get(below + 1).is_none_or(|&t| cell_of(places[bits], t) > cell),
                "one threshold a cell"
            );
            *out = (own.copied().unwrap_or(f32::INFINITY), below as u32);
        }
    }
    let mut bytes: Vec<u8> = bytemuck::cast_slice(&points).to_vec();
    for (threshold, below) in cells {
        bytes.extend(threshold.to_le_bytes());
        bytes.extend(below.to_le_bytes());
    }
    bytes.extend_from_slice(bytemuck::cast_slice(&places));
    let mut steps = [0f32; 8];
    for (width, step) in steps.iter_mut().enumerate().take(MAX_WIDTH + 1).skip(1) {
        *step = even_step(width);
    }
    bytes.extend_from_slice(bytemuck::cast_slice(&steps));
    for x in [&codec.stats.factors[..], codec.stats.thresholds()] {
        let mut padded = [0f32; MAX_SCALES];
        padded[..x.len()].copy_from_slice(x);
        bytes.extend_from_slice(bytemuck::cast_slice(&padded));
    }
    bytes
}

fn turns(codec: &Codec, head_dim: usize) -> Vec<u32> {
    let rotary = &codec.rotary;
    let (rows, stride) = (BLOCK / 2, head_dim / 2 + 4);
    let mut turns = vec![0u32; rows * stride];
    for i in 0..rows {
        for p in 0..rotary.pairs {
            let from = (rows + i) * rotary.pairs + p;
            let half = |x: f32| u32::from(half::f16::from_f32(x).to_bits());
            turns[i * stride + p] = half(rotary.offset_cos[from]) | half(rotary.offset_sin[from]) << 16;
        }
    }
    turns
}

/// The neighbours of eight key channels in which a sink query is not all zeros: their numbers, then how many.
fn active(sink_query: &[f32]) -> [u8; MAX_ACTIVE + 16] {
    let mut out = [0; MAX_ACTIVE + 16];
    let mut count = 0;
    for (b, x) in sink_query.chunks_exact(8).enumerate() {
        if x.iter().any(|&x| x != 0.0) {
            out[count] = b as u8;
            count += 1;
        }
    }
    out[MAX_ACTIVE] = count as u8;
    out
}

struct Block(Vec<u8>);

impl Block {
    fn put(&mut self, bytes: &[u8]) -> u32 {
        self.0.resize(self.0.len().next_multiple_of(16), 0);
        let at = self.0.len() as u32;
        self.0.extend_from_slice(bytes);
        at
    }
}

/// The tables of a codec; the block begins with its [`Header`].
///
/// A head's record: f32 `[7][head_dim]` K mean, K step, K sigma, V mean, V step, V sigma, sink query; u16
/// `[4][head_dim]` K order, V order, and their inverses; u8 `[2][MAX_UNITS]` K widths, V widths; u8 `[48]` K's channels
/// that count for scores (see `active`).
pub fn tables(codec: &Codec) -> Vec<u8> {
    let shape = codec.shape();
    let d = shape.head_dim;
    let layout = codec.page_layout(0).expect("a model has a layer");
    let mut header = <Header as bytemuck::Zeroable>::zeroed();
    let mut block = Block(vec![0; size_of::<Header>()]);
    let mut layers: Vec<u32> = Vec::new();
    let mut heads: Vec<u8> = Vec::new();
    for layer in 0..shape.num_layers {
        let l = codec.page_layout(layer).expect("layer in range");
        layers.extend([l.code_bits, l.num_slots, l.side_offset, l.slots_offset].map(|x| x as u32));
        for head in 0..shape.num_kv_heads {
            let t = codec.tables(layer, head).expect("head in range");
            for s in [&t.k, &t.v] {
                for x in [&s.mean, &s.step, &s.sigma] {
                    heads.extend_from_slice(bytemuck::cast_slice(x));
                }
            }
            heads.extend_from_slice(bytemuck::cast_slice(&t.sink_query));
            for s in [&t.k, &t.v] {
                heads.extend_from_slice(bytemuck::cast_slice(&s.order));
            }
            for s in [&t.k, &t.v] {
                heads.extend_from_slice(bytemuck::cast_slice(&inverse(&s.order)));
            }
            for s in [&t.k, &t.v] {
                heads.extend_from_slice(&padded_widths(s));
            }
            heads.extend_from_slice(&active(&t.sink_query));
        }
    }
    let rotary = &codec.rotary;
    let natural: Vec<u16> = match &rotary.natural {
        Some(n) => n.iter().map(|&i| i as u16).collect(),
        None => (0..d as u16).collect(),
    };
    let max_blocks = shape.max_blocks();
    let mut centre = (Vec::new(), Vec::new());
    for n in 0..max_blocks {
        let (cos, sin) = rotary.centre(n);
        centre.0.extend_from_slice(cos);
        centre.1.extend_from_slice(sin);
    }
    let mut grids: Vec<u32> = Vec::new();
    let mut thresholds = vec![0f32; (MAX_WIDTH + 1) * MAX_THRESHOLDS];
    let trellis = codec.recipe().quantizer == Quantizer::Trellis;
    for (w, g) in codec.grids.iter().enumerate() {
        let per_subset = g.thresholds.len() / if trellis { 4 } else { 1 };
        grids.extend([g.alpha.to_bits(), g.beta.to_bits(), per_subset as u32, g.symbol_bits]);
        thresholds[w * MAX_THRESHOLDS..][..g.thresholds.len()].copy_from_slice(&g.thresholds);
    }
    header.head_dim = d as u32;
    header.num_kv_heads = shape.num_kv_heads as u32;
    header.num_layers = shape.num_layers as u32;
    header.pairs = rotary.pairs as u32;
    header.max_blocks = max_blocks as u32;
    header.page_bytes = layout.page_bytes as u32;
    header.unit_channels = layout.unit.channels as u32;
    header.unit_tokens = layout.unit.tokens as u32;
    header.calibrated = u32::from(codec.stats.calibrated);
    header.trellis = u32::from(trellis);
    header.scale_codes = codec.stats.factors.len() as u32;
    header.head_stride = (heads.len() / (shape.num_layers * shape.num_kv_heads)) as u32;
    header.layers = block.put(bytemuck::cast_slice(&layers));
    header.heads = block.put(&heads);
    header.natural = block.put(bytemuck::cast_slice(&natural));
    header.centre_cos = block.put(bytemuck::cast_slice(&centre.0));
    header.centre_sin = block.put(bytemuck::cast_slice(&centre.1));
    debug_assert_eq!(rotary.offset_cos.len(), BLOCK * rotary.pairs);
    header.offset_cos = block.put(bytemuck::cast_slice(&rotary.offset_cos));
    header.offset_sin = block.put(bytemuck::cast_slice(&rotary.offset_sin));
    header.factors = block.put(bytemuck::cast_slice(&codec.stats.factors));
    header.scale_thresholds = block.put(bytemuck::cast_slice(codec.stats.thresholds()));
    header.grids = block.put(bytemuck::cast_slice(&grids));
    header.thresholds = block.put(bytemuck::cast_slice(&thresholds));
    header.interleaved = u32::from(rotary.pairs > 1 && rotary.natural.is_some());
    header.seal = block.put(&seal_tables(codec));
    header.turns = block.put(bytemuck::cast_slice(&turns(codec, d)));
    header.offsets = block.put(bytemuck::cast_slice(&fragments::offsets(codec)));
    let attend = fragments::heads(codec);
    header.attend = block.put(&attend);
    header.attend_stride = (attend.len() / (shape.num_layers * shape.num_kv_heads)) as u32;
    block.0.resize(block.0.len().next_multiple_of(16), 0);
    header.total_bytes = block.0.len() as u32;
    block.0[..size_of::<Header>()].copy_from_slice(bytemuck::bytes_of(&header));
    block.0
}

/// Position in code order of each channel.
pub(crate) fn inverse(order: &[u16]) -> Vec<u16> {
    let mut position = vec![0; order.len()];
    for (p, &channel) in order.iter().enumerate() {
        position[usize::from(channel)] = p as u16;
    }
    position
}

fn padded_widths(s: &StreamTables) -> [u8; MAX_UNITS] {
    let mut w = [0; MAX_UNITS];
    w[..s.widths.len()].copy_from_slice(&s.widths);
    w
}
