//! What a serving engine calls once a layer and step: [`write`] stores the step's keys and values and seals the blocks
//! that became full; [`attend`] computes attention over pages, open blocks and the step's own tokens.

use crate::codec::Codec;
use crate::error::{Error, Result, check_index};
use crate::rows::{ElementsMut, Rows, Tensor, check_span};
use crate::shape::BLOCK;
use rayon::prelude::*;

pub use crate::attend::{AttendArgs, AttendOptions, attend};

/// Pages of one layer: `[num_blocks][num_heads]`, strides in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Pages<'a> {
    pub bytes: &'a [u8],
    pub num_blocks: usize,
    pub block_stride: usize,
    pub head_stride: usize,
}

impl<'a> Pages<'a> {
    /// One page.
    #[inline(always)]
    pub fn page(&self, block: usize, head: usize, page_bytes: usize) -> &'a [u8] {
        let at = block * self.block_stride + head * self.head_stride;
        &self.bytes[at..at + page_bytes]
    }

    pub(crate) fn check(&self, heads: usize, page_bytes: usize) -> Result<()> {
        let dims = [(self.num_blocks, self.block_stride), (heads, self.head_stride)];
        check_span("pages", self.bytes.len(), &dims, page_bytes)?;
        if heads > 1 && self.head_stride < page_bytes {
            return Err(Error::OutOfRange {
                what: "page_head_stride",
                value: self.head_stride as i64,
                valid: format!("at least a page, {page_bytes} bytes"),
            });
        }
        Ok(())
    }
}

/// Index into `open_blocks` (`[num_open][K, V][num_heads][128][head_dim]`) of a row.
#[inline(always)]
pub(crate) fn open_row(
    slot: usize,
    stream: usize,
    heads: usize,
    head: usize,
    token: usize,
    d: usize,
) -> usize {
    (((slot * 2 + stream) * heads + head) * BLOCK + token) * d
}

/// Refuses an open-block pool that is too small or a map with entries outside it.
pub(crate) fn check_open(
    len: usize,
    num_open: usize,
    heads: usize,
    d: usize,
    open_slot: &[i32],
) -> Result<()> {
    let need = open_row(1, 0, heads, 0, 0, d).checked_mul(num_open).ok_or(Error::Overflow("open_blocks"))?;
    if len < need {
        return Err(Error::BufferTooSmall { what: "open_blocks", have: len, need });
    }
    match open_slot.iter().find(|s| **s < -1 || **s >= num_open as i32) {
        Some(s) => Err(Error::OutOfRange {
            what: "open_slot",
            value: i64::from(*s),
            valid: format!("-1 (none) or 0..{num_open}"),
        }),
        None => Ok(()),
    }
}

/// Arguments of [`write`].
#[derive(Debug)]
pub struct WriteArgs<'a> {
    pub layer: usize,
    /// First KV head of this tensor-parallel rank in the whole model.
    pub first_head: usize,
    pub num_heads: usize,
    pub num_tokens: usize,
    pub k: Tensor<'a>,
    pub v: Tensor<'a>,
    /// `block * 128 + offset` of each token; -1 is padding.
    pub slot_mapping: &'a [i64],
    pub positions: &'a [i32],
    pub pages: &'a mut [u8],
    pub num_blocks: usize,
    pub page_block_stride: usize,
    pub page_head_stride: usize,
    /// `[num_open][K, V][num_heads][128][head_dim]`, in the dtype of `k` and `v`.
    pub open_blocks: ElementsMut<'a>,
    pub num_open: usize,
    /// By block: its open block, or -1.
    pub open_slot: &'a [i32],
}

/// Tokens of one block in a step.
struct Touched {
    block: usize,
    block_index: usize,
    /// (offset in the block, token of the step), in the order of the step.
    tokens: Vec<(usize, usize)>,
}

impl Touched {
    /// First token of the step if the step holds the whole block as 128 neighbours.
    fn whole(&self) -> Option<usize> {
        let first = self.tokens[0].1;
        let neighbours = self.tokens.iter().enumerate().all(|(i, &(o, t))| o == i && t == first + i);
        (self.tokens.len() == BLOCK && neighbours).then_some(first)
    }

    fn fills(&self) -> bool {
        self.tokens.iter().any(|&(o, _)| o == BLOCK - 1)
    }
}

/// Stores the keys and values of a step. Each token goes to its block's open block; a block whose last token is written is
/// sealed, from the step's tensors where they hold all of it. Everything is checked before the first byte is written; the
/// only later refusal is a value that is not finite, and then no page has changed.
pub fn write(codec: &Codec, args: &mut WriteArgs) -> Result<()> {
    let d = codec.shape().head_dim;
    check_heads(codec, args.layer, args.first_head, args.num_heads)?;
    args.k.check("k", args.num_tokens, args.num_heads, d)?;
    args.v.check("v", args.num_tokens, args.num_heads, d)?;
    let pages = Pages {
        bytes: args.pages,
        num_blocks: args.num_blocks,
        block_stride: args.page_block_stride,
        head_stride: args.page_head_stride,
    };
    pages.check(args.num_heads, codec.page_bytes())?;
    for (what, have, need) in [
        ("slot_mapping", args.slot_mapping.len(), args.num_tokens),
        ("positions", args.positions.len(), args.num_tokens),
        ("open_slot", args.open_slot.len(), args.num_blocks),
    ] {
        if have < need {
            return Err(Error::BufferTooSmall { what, have, need });
        }
    }
    check_open(args.open_blocks.len(), args.num_open, args.num_heads, d, &args.open_slot[..args.num_blocks])?;
    let touched = group_by_block(codec, args)?;

    // Seal first into memory of our own: a refused value then leaves every page and open block as it was.
    let (k, v) = (args.k, args.v);
    let open = &args.open_blocks;
    let full: Vec<&Touched> = touched.iter().filter(|t| t.fills()).collect();
    let heads = args.num_heads;
    let sealed: Vec<Vec<u8>> = (0..full.len() * heads)
        .into_par_iter()
        .map(|task| {
            let (t, head) = (full[task / heads], task % heads);
            let mut page = vec![0; codec.page_bytes()];
            let seal = |k: Rows, v: Rows, page: &mut [u8]| {
                codec.seal(args.layer, args.first_head + head, t.block_index, k, v, page)
            };
            if let Some(first) = t.whole() {
                seal(k.head(first, head), v.head(first, head), &mut page)?;
            } else {
                let (keys, values) = assemble(t, open, args.open_slot, heads, head, d, &k, &v);
                seal(Rows::dense(&keys, d), Rows::dense(&values, d), &mut page)?;
            }
            Ok(page)
        })
        .collect::<Result<_>>()?;

    for t in &touched {
        let slot = args.open_slot[t.block];
        if slot < 0 {
            continue; // A whole block of a prompt: sealed straight from the step's tensors.
        }
        for &(offset, token) in &t.tokens {
            for head in 0..heads {
                for (stream, x) in [&k, &v].into_iter().enumerate() {
                    let at = open_row(slot as usize, stream, heads, head, offset, d);
                    args.open_blocks.copy_from(at, &x.data, x.at(token, head), d);
                }
            }
        }
    }
    for (task, page) in sealed.iter().enumerate() {
        let at = full[task / heads].block * args.page_block_stride + task % heads * args.page_head_stride;
        args.pages[at..at + page.len()].copy_from_slice(page);
    }
    Ok(())
}

/// Rows of a block that is partly in its open block and partly in this step.
#[allow(clippy::too_many_arguments)]
fn assemble(
    t: &Touched,
    open: &ElementsMut,
    open_slot: &[i32],
    heads: usize,
    head: usize,
    d: usize,
    k: &Tensor,
    v: &Tensor,
) -> (Vec<f32>, Vec<f32>) {
    let slot = open_slot[t.block] as usize;
    let read = |stream: usize, x: &Tensor| {
        let mut rows = vec![0.0; BLOCK * d];
        open.as_ref().load(open_row(slot, stream, heads, head, 0, d), &mut rows);
        for &(offset, token) in &t.tokens {
            x.data.load(x.at(token, head), &mut rows[offset * d..(offset + 1) * d]);
        }
        rows
    };
    (read(0, k), read(1, v))
}

fn group_by_block(codec: &Codec, args: &WriteArgs) -> Result<Vec<Touched>> {
    let mut touched: Vec<Touched> = Vec::new();
    let mut entry: std::collections::HashMap<usize, usize> = std::collections::HashMap::new();
    for token in 0..args.num_tokens {
        let slot = args.slot_mapping[token];
        if slot == -1 {
            continue;
        }
        let bound = args.num_blocks * BLOCK;
        if slot < 0 || slot as usize >= bound {
            let valid = format!("-1 (padding) or 0..{bound}");
            return Err(Error::OutOfRange { what: "slot_mapping", value: slot, valid });
        }
        let (block, offset) = (slot as usize / BLOCK, slot as usize % BLOCK);
        let position = args.positions[token];
        if position < 0
            || position as usize % BLOCK != offset
            || position as usize >= codec.shape().max_position
        {
            let valid =
                format!("0..{}, {offset} modulo {BLOCK} as its slot {slot}", codec.shape().max_position);
            return Err(Error::OutOfRange { what: "positions", value: i64::from(position), valid });
        }
        let block_index = position as usize / BLOCK;
        let at = *entry.entry(block).or_insert_with(|| {
            touched.push(Touched { block, block_index, tokens: Vec::new() });
            touched.len() - 1
        });
        let t = &mut touched[at];
        if t.block_index != block_index {
            let valid =
                format!("{}..{} for block {block}", t.block_index * BLOCK, (t.block_index + 1) * BLOCK);
            return Err(Error::OutOfRange { what: "positions", value: i64::from(position), valid });
        }
        if t.tokens.iter().any(|&(o, _)| o == offset) {
            let valid = "every slot once".to_string();
            return Err(Error::OutOfRange { what: "slot_mapping", value: slot, valid });
        }
        t.tokens.push((offset, token));
    }
    let mut owner: std::collections::HashMap<i32, usize> = std::collections::HashMap::new();
    for t in &touched {
        let slot = args.open_slot[t.block];
        if slot < 0 && t.whole().is_none() {
            return Err(Error::NoOpenSlot { block: t.block, slot });
        }
        if slot >= 0 && owner.insert(slot, t.block).is_some() {
            let valid = "one block each".to_string();
            return Err(Error::OutOfRange { what: "open_slot", value: i64::from(slot), valid });
        }
    }
    Ok(touched)
}

/// Refuses a layer or a range of KV heads that the model does not have.
pub(crate) fn check_heads(codec: &Codec, layer: usize, first_head: usize, num_heads: usize) -> Result<()> {
    check_index("layer", layer, codec.shape().num_layers)?;
    let last = first_head.checked_add(num_heads).ok_or(Error::Overflow("first_head + num_heads"))?;
    if num_heads == 0 || last > codec.shape().num_kv_heads {
        return Err(Error::OutOfRange {
            what: "first_head + num_heads",
            value: last as i64,
            valid: format!("at least one head, up to {}", codec.shape().num_kv_heads),
        });
    }
    Ok(())
}
