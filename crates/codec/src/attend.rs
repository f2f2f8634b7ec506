//! Attention of a step over pages, open blocks and the step's own tokens.
//!
//! Work is cut into (sequence, KV head, tile of query tokens, segment of keys); segments of one tile are combined by
//! log-sum-exp in a fixed order. The cut depends on the sequence alone, never on what else is in the batch, so a request
//! computes the same bits alone and in company.
//!
//! A page is opened once a tile: K in the frame of its block's centre (the queries are turned back there), V in Hadamard
//! space (the sum over a segment's pages is transformed once, at the end). Attention is checked to a bound, not bit for
//! bit: products run through `matrixmultiply`, which contracts.

use crate::codec::Codec;
use crate::error::{Error, Result};
use crate::fast::open_centred;
use crate::hadamard;
use crate::rotary::turn_back;
use crate::rows::{Elements, ElementsMut, Tensor, check_span};
use crate::shape::BLOCK;
use crate::simd::dispatch;
use crate::step::{Pages, check_heads, check_open, open_row};
use rayon::prelude::*;

/// Query tokens of a tile: with 3 to 8 query heads a KV head, 200 to 500 rows share one opened page.
const TILE: usize = 64;
/// Pages of a segment: long sequences then spread over cores even at batch 1.
const SEGMENT: usize = 32;

/// Arguments of [`attend`].
#[derive(Debug)]
pub struct AttendArgs<'a> {
    pub layer: usize,
    /// First KV head of this tensor-parallel rank in the whole model.
    pub first_head: usize,
    pub num_kv_heads: usize,
    pub num_q_heads: usize,
    pub num_tokens: usize,
    /// Factor of the scores, usually 1/sqrt(head_dim).
    pub scale: f32,
    /// A query reads pages for every block before its own, also of this step: results then do not depend on how a prompt
    /// was cut into steps.
    pub sealed_prefill: bool,
    pub q: Tensor<'a>,
    pub k: Tensor<'a>,
    pub v: Tensor<'a>,
    pub out: ElementsMut<'a>,
    pub out_token_stride: usize,
    pub out_head_stride: usize,
    /// `[num_seqs + 1]`: sequence s owns rows `query_start[s]..query_start[s + 1]`.
    pub query_start: &'a [i32],
    /// Tokens of each sequence, this step's included.
    pub seq_lens: &'a [i32],
    /// `[num_seqs][max_blocks_per_seq]`, rows `block_table_stride` apart.
    pub block_table: &'a [i32],
    pub block_table_stride: usize,
    pub max_blocks_per_seq: usize,
    pub pages: Pages<'a>,
    pub open_blocks: Elements<'a>,
    pub num_open: usize,
    pub open_slot: &'a [i32],
    /// `[num_tokens][num_q_heads]`, natural logarithm of the softmax sum; optional.
    pub lse: Option<&'a mut [f32]>,
    pub options: AttendOptions<'a>,
}

/// What some models add to attention. Default: nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct AttendOptions<'a> {
    /// Scores s become `cap * tanh(s / cap)`; 0: they stay.
    pub soft_cap: f32,
    /// `[num_q_heads]`: a score of a key without a value, for each query head; it is in the softmax sum.
    pub sinks: Option<&'a [f32]>,
}

/// One sequence of a step.
struct Sequence<'a> {
    /// First row of q.
    row: usize,
    tokens: usize,
    /// Tokens before this step.
    history: usize,
    blocks: &'a [i32],
}

/// Query tokens `from..to` of a sequence for one KV head.
#[derive(Clone, Copy)]
struct Tile {
    sequence: usize,
    head: usize,
    from: usize,
    to: usize,
    /// Blocks read from pages; the tokens after them are read raw.
    pages: usize,
}

/// Part of a tile's keys.
#[derive(Clone, Copy)]
struct Task {
    tile: usize,
    pages: (usize, usize),
    raw: bool,
}

/// Unnormalised attention of a tile's rows over some keys.
struct Partial {
    /// Row maximum of the scaled scores, sum of exponentials, weighted sum of values `[rows][d]`.
    max: Vec<f32>,
    sum: Vec<f32>,
    out: Vec<f32>,
}

impl Partial {
    fn new(rows: usize, d: usize) -> Partial {
        Partial { max: vec![f32::NEG_INFINITY; rows], sum: vec![0.0; rows], out: vec![0.0; rows * d] }
    }
}

/// Attention of a step; all arguments are checked first, the output is untouched on error.
pub fn attend(codec: &Codec, args: &mut AttendArgs) -> Result<()> {
    let d = codec.shape().head_dim;
    let sequences = check(codec, args)?;
    let group = args.num_q_heads / args.num_kv_heads;
    let mut tiles = Vec::new();
    let mut tasks = Vec::new();
    for (s, seq) in sequences.iter().enumerate() {
        for head in 0..args.num_kv_heads {
            let mut from = 0;
            while from < seq.tokens {
                // Tiles end with the query's block, so that in sealed prefill all of a tile reads the same pages.
                let position = seq.history + from;
                let to = (from + TILE).min(seq.tokens).min(from + BLOCK - position % BLOCK);
                let pages = if args.sealed_prefill { position / BLOCK } else { seq.history / BLOCK };
                tiles.push(Tile { sequence: s, head, from, to, pages });
                for first in (0..pages).step_by(SEGMENT) {
                    tasks.push(Task {
                        tile: tiles.len() - 1,
                        pages: (first, pages.min(first + SEGMENT)),
                        raw: false,
                    });
                }
                tasks.push(Task { tile: tiles.len() - 1, pages: (0, 0), raw: true });
                from = to;
            }
        }
    }
    let shared: &AttendArgs = args;
    let partials: Vec<Partial> = tasks
        .par_iter()
        .map(|task| {
            let tile = tiles[task.tile];
            run(codec, shared, &sequences[tile.sequence], tile, *task)
        })
        .collect::<Result<_>>()?;

    let mut row = vec![0.0; d];
    let mut next = 0;
    for (i, tile) in tiles.iter().enumerate() {
        let parts = next..next + tasks[next..].iter().take_while(|t| t.tile == i).count();
        next = parts.end;
        let seq = &sequences[tile.sequence];
        for t in tile.from..tile.to {
            for g in 0..group {
                let r = (t - tile.from) * group + g;
                let (token, q_head) = (seq.row + t, tile.head * group + g);
                let sink = args.options.sinks.map_or(f32::NEG_INFINITY, |sinks| sinks[q_head]);
                let lse = combine(&partials[parts.clone()], r, sink, &mut row);
                args.out.store(token * args.out_token_stride + q_head * args.out_head_stride, &row);
                if let Some(out) = &mut args.lse {
                    out[token * args.num_q_heads + q_head] = lse;
                }
            }
        }
    }
    Ok(())
}

/// Merges one row of a tile's partial results and a sink; returns its log-sum-exp.
fn combine(parts: &[Partial], r: usize, sink: f32, row: &mut [f32]) -> f32 {
    let d = row.len();
    let max = parts.iter().fold(sink, |m, p| m.max(p.max[r]));
    row.fill(0.0);
    let mut sum = (sink - max).exp();
    for p in parts.iter().filter(|p| p.sum[r] > 0.0) {
        let w = (p.max[r] - max).exp();
        sum += w * p.sum[r];
        row.iter_mut().zip(&p.out[r * d..(r + 1) * d]).for_each(|(o, x)| *o += w * x);
    }
    row.iter_mut().for_each(|o| *o /= sum);
    max + sum.ln()
}

dispatch! {
    /// Attention of one tile over one segment of its keys.
    fn run(codec: &Codec, args: &AttendArgs, seq: &Sequence, tile: Tile, task: Task) -> Result<Partial> = run_inner
}

#[inline(always)]
fn run_inner(codec: &Codec, args: &AttendArgs, seq: &Sequence, tile: Tile, task: Task) -> Result<Partial> {
    let d = codec.shape().head_dim;
    let group = args.num_q_heads / args.num_kv_heads;
    let rows = (tile.to - tile.from) * group;
    // Queries, scaled, canonical only where pages are met.
    let mut q = vec![0.0; rows * d];
    for t in tile.from..tile.to {
        for g in 0..group {
            let row = &mut q[((t - tile.from) * group + g) * d..][..d];
            args.q.data.load(args.q.at(seq.row + t, tile.head * group + g), row);
            row.iter_mut().for_each(|x| *x *= args.scale);
        }
    }
    let mut part = Partial::new(rows, d);
    let mut k = vec![0.0; BLOCK * d];
    let mut v = vec![0.0; BLOCK * d];
    let mut scores = vec![0.0; rows * BLOCK];
    if !task.raw {
        q.chunks_exact_mut(d).for_each(|row| codec.rotary.to_canonical(row));
        let mut turned = vec![0.0; rows * d];
        for b in task.pages.0..task.pages.1 {
            let page = args.pages.page(seq.blocks[b] as usize, tile.head, codec.page_bytes());
            let header = open_centred(codec, args.layer, args.first_head + tile.head, page, &mut k, &mut v)?;
            if header.block_index as usize != b {
                return Err(Error::BadPage(format!(
                    "block {} holds tokens of block index {}, the sequence has it at {b}",
                    seq.blocks[b], header.block_index
                )));
            }
            turned.copy_from_slice(&q);
            let (cos, sin) = codec.rotary.centre(b);
            turned.chunks_exact_mut(d).for_each(|row| turn_back(row, cos, sin));
            accumulate(&turned, &k, &v, d, BLOCK, None, args.options.soft_cap, &mut scores, &mut part);
        }
        part.out.chunks_exact_mut(d).for_each(hadamard::transform);
        return Ok(part);
    }
    // Raw keys: the open block's tokens of the history, then the step's own, block by block.
    let start = tile.pages * BLOCK;
    let end = seq.history + tile.to;
    let mut p = start;
    while p < end {
        let n = (end - p).min(BLOCK - p % BLOCK);
        for i in 0..n {
            let (kr, vr) = (&mut k[i * d..(i + 1) * d], &mut v[i * d..(i + 1) * d]);
            if p + i < seq.history {
                let slot = args.open_slot[seq.blocks[(p + i) / BLOCK] as usize] as usize;
                let at = |stream| open_row(slot, stream, args.num_kv_heads, tile.head, (p + i) % BLOCK, d);
                args.open_blocks.load(at(0), kr);
                args.open_blocks.load(at(1), vr);
            } else {
                let token = seq.row + p + i - seq.history;
                args.k.data.load(args.k.at(token, tile.head), kr);
                args.v.data.load(args.v.at(token, tile.head), vr);
            }
        }
        // Row r is the query at position history + from + r / group; it sees keys up to itself.
        let causal = Causal { first_query: seq.history + tile.from, first_key: p, group };
        accumulate(&q, &k, &v, d, n, Some(causal), args.options.soft_cap, &mut scores, &mut part);
        p += n;
    }
    Ok(part)
}

#[derive(Clone, Copy)]
struct Causal {
    first_query: usize,
    first_key: usize,
    group: usize,
}

/// Online softmax over `n` keys.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn accumulate(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    d: usize,
    n: usize,
    causal: Option<Causal>,
    soft_cap: f32,
    scores: &mut [f32],
    part: &mut Partial,
) {
    let rows = q.len() / d;
    gemm((rows, d, n), (q, d, 1), (k, 1, d), 0.0, (scores, BLOCK));
    for r in 0..rows {
        let s = &mut scores[r * BLOCK..r * BLOCK + n];
        if soft_cap > 0.0 {
            s.iter_mut().for_each(|x| *x = soft_capped(*x, soft_cap));
        }
        if let Some(c) = causal {
            let visible = (c.first_query + r / c.group + 1).saturating_sub(c.first_key).min(n);
            s[visible..].fill(f32::NEG_INFINITY);
            if visible == 0 {
                s.fill(0.0);
                continue;
            }
        }
        let max = s.iter().fold(part.max[r], |m, x| m.max(*x));
        let fade = (part.max[r] - max).exp();
        let mut sum = [0.0f32; 8];
        for chunk in s.chunks_mut(8) {
            for (x, sum) in chunk.iter_mut().zip(&mut sum) {
                *x = exp(*x - max);
                *sum += *x;
            }
        }
        part.max[r] = max;
        part.sum[r] = part.sum[r] * fade + sum.iter().sum::<f32>();
        if fade != 1.0 {
            part.out[r * d..(r + 1) * d].iter_mut().for_each(|o| *o *= fade);
        }
    }
    gemm((rows, n, d), (scores, BLOCK, 1), (v, d, 1), 1.0, (&mut part.out, d));
}

/// `c[m x n] = a[m x k] * b[k x n] + beta * c`; (elements, row stride, column stride).
#[inline(always)]
fn gemm(
    (m, k, n): (usize, usize, usize),
    (a, ars, acs): (&[f32], usize, usize),
    (b, brs, bcs): (&[f32], usize, usize),
    beta: f32,
    (c, crs): (&mut [f32], usize),
) {
    let reach = |rows: usize, rs: usize, cols: usize, cs: usize| (rows - 1) * rs + (cols - 1) * cs;
    assert!(m > 0 && n > 0 && k > 0);
    assert!(
        reach(m, ars, k, acs) < a.len() && reach(k, brs, n, bcs) < b.len() && reach(m, crs, n, 1) < c.len()
    );
    // SAFETY: the three strided matrices lie inside their slices (asserted above), and `c` is borrowed mutably, so it
    // overlaps neither `a` nor `b`.
    #[allow(unsafe_code)]
    unsafe {
        matrixmultiply::sgemm(
            m,
            k,
            n,
            1.0,
            a.as_ptr(),
            ars as isize,
            acs as isize,
            b.as_ptr(),
            brs as isize,
            bcs as isize,
            beta,
            c.as_mut_ptr(),
            crs as isize,
            1,
        );
    }
}

/// e^x for x <= 0, relative error below 2^-24 (1 + |x|): 2^n by exponent bits, 2^f by the Taylor polynomial of degree 7 on |f| <= 1/2 (remainder
/// 1.3e-8). The library's `exp` is no inline function and would keep the loop scalar.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const C: [f32; 7] = [
        std::f32::consts::LN_2,
        0.240_226_5,
        0.055_504_11,
        0.009_618_129,
        0.001_333_355_8,
        0.000_154_035_3,
        0.000_015_252_73,
    ];
    // Below 2^-126 the result is flushed: -infinity and padding included.
    let t = (x * std::f32::consts::LOG2_E).max(-126.0);
    let n = t.round_ties_even();
    let f = t - n;
    let mut p = C[6];
    for c in C[..6].iter().rev() {
        p = p * f + c;
    }
    let power = f32::from_bits(((n as i32 + 127) as u32) << 23);
    let y = (p * f + 1.0) * power;
    if t <= -126.0 { 0.0 } else { y }
}

/// `cap * tanh(x / cap)`, to 4e-7 of cap.
#[inline(always)]
fn soft_capped(x: f32, cap: f32) -> f32 {
    let e = exp(-2.0 * x.abs() / cap);
    (cap * (1.0 - e) / (1.0 + e)).copysign(x)
}

fn check<'a>(codec: &Codec, args: &AttendArgs<'a>) -> Result<Vec<Sequence<'a>>> {
    let d = codec.shape().head_dim;
    let range = |what, value: i64, valid: String| Err(Error::OutOfRange { what, value, valid });
    check_heads(codec, args.layer, args.first_head, args.num_kv_heads)?;
    if args.num_q_heads == 0 || !args.num_q_heads.is_multiple_of(args.num_kv_heads) {
        let valid = format!("a multiple of num_kv_heads, {}", args.num_kv_heads);
        return range("num_q_heads", args.num_q_heads as i64, valid);
    }
    if !args.scale.is_finite() {
        return range("scale", args.scale as i64, "a finite number".to_string());
    }
    if !(args.options.soft_cap >= 0.0 && args.options.soft_cap.is_finite()) {
        return range("soft_cap", args.options.soft_cap as i64, "0 (none) or a positive number".to_string());
    }
    if let Some(sinks) = args.options.sinks {
        if sinks.len() != args.num_q_heads {
            return Err(Error::BufferTooSmall { what: "sinks", have: sinks.len(), need: args.num_q_heads });
        }
        if let Some(sink) = sinks.iter().find(|sink| !sink.is_finite()) {
            return range("sinks", *sink as i64, "finite numbers".to_string());
        }
    }
    args.q.check("q", args.num_tokens, args.num_q_heads, d)?;
    args.k.check("k", args.num_tokens, args.num_kv_heads, d)?;
    args.v.check("v", args.num_tokens, args.num_kv_heads, d)?;
    let out_dims = [(args.num_tokens, args.out_token_stride), (args.num_q_heads, args.out_head_stride)];
    check_span("out", args.out.len(), &out_dims, d)?;
    args.pages.check(args.num_kv_heads, codec.page_bytes())?;
    if args.open_slot.len() < args.pages.num_blocks {
        let (have, need) = (args.open_slot.len(), args.pages.num_blocks);
        return Err(Error::BufferTooSmall { what: "open_slot", have, need });
    }
    let open_slot = &args.open_slot[..args.pages.num_blocks];
    check_open(args.open_blocks.len(), args.num_open, args.num_kv_heads, d, open_slot)?;
    if let Some(lse) = &args.lse {
        let (have, need) = (lse.len(), args.num_tokens * args.num_q_heads);
        if have < need {
            return Err(Error::BufferTooSmall { what: "lse", have, need });
        }
    }
    let n = args.seq_lens.len();
    if args.query_start.len() != n + 1 {
        return Err(Error::BufferTooSmall { what: "query_start", have: args.query_start.len(), need: n + 1 });
    }
    check_span(
        "block_table",
        args.block_table.len(),
        &[(n, args.block_table_stride)],
        args.max_blocks_per_seq,
    )?;
    let mut sequences = Vec::with_capacity(n);
    for s in 0..n {
        let (from, to) = (args.query_start[s], args.query_start[s + 1]);
        if from < 0 || to < from || to as usize > args.num_tokens {
            return range("query_start", i64::from(to), format!("ascending, 0..={}", args.num_tokens));
        }
        let (row, tokens) = (from as usize, (to - from) as usize);
        if tokens == 0 {
            continue; // A padded row of a fixed-size batch.
        }
        let len = args.seq_lens[s];
        if len < tokens as i32 || len as usize > codec.shape().max_position {
            let valid = format!("{tokens} (this step's tokens)..={}", codec.shape().max_position);
            return range("seq_lens", i64::from(len), valid);
        }
        let history = len as usize - tokens;
        let blocks = (len as usize).div_ceil(BLOCK);
        if blocks > args.max_blocks_per_seq {
            return range(
                "seq_lens",
                i64::from(len),
                format!("up to {} blocks of {BLOCK}", args.max_blocks_per_seq),
            );
        }
        let blocks = &args.block_table[s * args.block_table_stride..][..blocks];
        if let Some(b) = blocks.iter().find(|b| **b < 0 || **b as usize >= args.pages.num_blocks) {
            return range("block_table", i64::from(*b), format!("0..{}", args.pages.num_blocks));
        }
        if !history.is_multiple_of(BLOCK) {
            let block = blocks[history / BLOCK] as usize;
            if open_slot[block] < 0 {
                return Err(Error::NoOpenSlot { block, slot: open_slot[block] });
            }
        }
        sequences.push(Sequence { row, tokens, history, blocks });
    }
    Ok(sequences)
}

#[cfg(test)]
mod tests {
    #[test]
    fn exp_is_accurate_and_flushes() {
        for i in 0..100_000 {
            let x = -87.0 * i as f32 / 100_000.0;
            let want = f64::from(x).exp();
            assert!((f64::from(super::exp(x)) / want - 1.0).abs() < 6e-8 * (2.0 - 2.0 * f64::from(x)), "{x}");
        }
        assert_eq!(super::exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(super::exp(-1e30), 0.0);
        assert_eq!(super::exp(0.0), 1.0);
    }

    #[test]
    fn the_soft_cap_is_accurate() {
        for cap in [1.0f32, 30.0, 50.0] {
            for i in -10_000..=10_000 {
                let x = 0.05 * i as f32;
                let want = f64::from(cap) * (f64::from(x) / f64::from(cap)).tanh();
                let got = f64::from(super::soft_capped(x, cap));
                assert!((got - want).abs() < 4e-7 * f64::from(cap), "{x} {cap}: {got} {want}");
            }
        }
    }
}
