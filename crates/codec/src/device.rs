//! A codec's static tables as one block of bytes for a device. `kernels/tables.cuh` declares the same layout; offsets are
//! counted in bytes from the block's start, every table begins at a multiple of 16.

use crate::codec::{Codec, StreamTables};
use crate::grid::MAX_WIDTH;
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
/// `[4][head_dim]` K order, V order, and their inverses; u8 `[2][MAX_UNITS]` K widths, V widths.
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
    block.0.resize(block.0.len().next_multiple_of(16), 0);
    header.total_bytes = block.0.len() as u32;
    block.0[..size_of::<Header>()].copy_from_slice(bytemuck::bytes_of(&header));
    block.0
}

/// Position in code order of each channel.
fn inverse(order: &[u16]) -> Vec<u16> {
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
