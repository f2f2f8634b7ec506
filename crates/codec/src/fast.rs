//! Seal and open for speed: the same arithmetic as [`crate::reference`], arranged so that the compiler vectorises it. All
//! 32 lanes of a unit, or all channels of a row, advance together; every element sees the same operations in the same
//! order, so the bytes are the same. `crate::simd` compiles these functions once per instruction set.

// Loops over lane and state indices of several parallel arrays are the form that the compiler vectorises.
#![allow(clippy::needless_range_loop)]

use crate::codec::{Codec, StreamTables};
use crate::error::Result;
use crate::grid::{Grid, even_error, even_step, point};
use crate::hadamard;
use crate::layout::PageLayout;
use crate::page::{self, Header};
use crate::recipe::{MAX_SLOTS, Quantizer};
use crate::rotary::{turn, turn_back};
use crate::rows::Rows;
use crate::shape::BLOCK;
use crate::simd::dispatch;
use crate::stats::SCALE_ATTEMPTS;
use crate::unit::{self, CODES, Codes, LANES, Stream, locate, place, unit_bytes};

/// Tokens that one partial sum of a block runs over; see [`crate::stats::block_sum`].
const PART: usize = BLOCK / 8;
/// Steps of the longest chain: 8 units (head_dim 256) of 16 codes.
const MAX_STEPS: usize = 128;
/// Bits of a refinement index in a step's packed word: 2^5 points a subset at width 6.
const INDEX_BITS: u32 = 5;

type F = [f32; LANES];
type I = [i32; LANES];

dispatch! {
    /// Seals a block; see [`Codec::seal`].
    pub fn seal(codec: &Codec, layer: usize, head: usize, block: usize, k: Rows, v: Rows, page: &mut [u8]) -> Result<()>
        = seal_inner
}

dispatch! {
    /// Opens a page; see [`Codec::open`].
    pub fn open(codec: &Codec, layer: usize, head: usize, page: &[u8], k: &mut [f32], v: &mut [f32]) -> Result<()>
        = open_inner
}

dispatch! {
    /// Opens a page as attention wants it: K canonical in the frame of its block's centre, V Hadamard-transformed.
    pub fn open_centred(codec: &Codec, layer: usize, head: usize, page: &[u8], k: &mut [f32], v: &mut [f32]) -> Result<Header>
        = open_centred_inner
}

/// Column sums of `rows` (row-major, d wide) in the order of [`crate::stats::block_sum`], of `f(row, channel value)`.
#[inline(always)]
fn column_sums(
    rows: &[f32],
    d: usize,
    exact: &[bool; BLOCK],
    square: bool,
    shift: Option<&[f32]>,
) -> Vec<f32> {
    let mut part = vec![0.0f32; 8 * d];
    for (w, p) in part.chunks_exact_mut(d).enumerate() {
        for j in w * PART..(w + 1) * PART {
            if exact[j] {
                continue;
            }
            let row = &rows[j * d..(j + 1) * d];
            match (square, shift) {
                (true, None) => p.iter_mut().zip(row).for_each(|(p, x)| *p += x * x),
                (true, Some(s)) => {
                    p.iter_mut().zip(row.iter().zip(s)).for_each(|(p, (x, s))| *p += (x - s) * (x - s))
                }
                (false, Some(s)) => p.iter_mut().zip(row.iter().zip(s)).for_each(|(p, (x, s))| *p += x - s),
                (false, None) => p.iter_mut().zip(row).for_each(|(p, x)| *p += x),
            }
        }
    }
    let at = |w: usize, i: usize| part[w * d + i];
    (0..d)
        .map(|i| {
            ((at(0, i) + at(1, i)) + (at(2, i) + at(3, i))) + ((at(4, i) + at(5, i)) + (at(6, i) + at(7, i)))
        })
        .collect()
}

/// Sum of products in eight interleaved partial sums, combined as a tree.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut p = [0.0f32; 8];
    for (x, y) in a.chunks_exact(8).zip(b.chunks_exact(8)) {
        for i in 0..8 {
            p[i] += x[i] * y[i];
        }
    }
    ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7]))
}

#[inline(always)]
fn slot_scores(before: &[f32], d: usize, sink_query: &[f32], calibrated: bool) -> [f32; BLOCK] {
    if calibrated {
        return std::array::from_fn(|j| dot(sink_query, &before[j * d..(j + 1) * d]));
    }
    let none = [false; BLOCK];
    let n = BLOCK as f32;
    let mean: Vec<f32> = column_sums(before, d, &none, false, None).iter().map(|s| s / n).collect();
    let inverse: Vec<f32> = column_sums(before, d, &none, true, Some(&mean))
        .iter()
        .zip(sink_query)
        .map(|(s, w)| w / (s / n + 1e-12))
        .collect();
    let mut square = vec![0.0; d];
    std::array::from_fn(|j| {
        for ((s, x), m) in square.iter_mut().zip(&before[j * d..(j + 1) * d]).zip(&mean) {
            *s = (x - m) * (x - m);
        }
        dot(&square, &inverse)
    })
}

#[inline(always)]
fn block_means(
    codec: &Codec,
    t: &StreamTables,
    rows: &[f32],
    exact: &[bool; BLOCK],
    ordinary: f32,
) -> (Vec<u16>, Vec<f32>) {
    column_sums(rows, t.mean.len(), exact, false, Some(&t.mean))
        .iter()
        .enumerate()
        .map(|(i, sum)| {
            let (code, value) = codec.stats.mean(sum / ordinary, t.step[i]);
            (code, t.mean[i] + value)
        })
        .unzip()
}

/// Normalises residual rows in place (channel order stays) and returns the scale codes.
#[inline(always)]
fn normalise(
    codec: &Codec,
    t: &StreamTables,
    rows: &mut [f32],
    exact: &[bool; BLOCK],
    ordinary: f32,
) -> Vec<u8> {
    let d = t.mean.len();
    let mut inverse = vec![0.0; d];
    let squares = column_sums(rows, d, exact, true, None);
    let mut scales = vec![0; d];
    for i in 0..d {
        scales[i] = codec.stats.scale_code(squares[i] / ordinary, t.sigma[i]);
    }
    best_scales(codec, t, rows, exact, &mut scales);
    for i in 0..d {
        inverse[i] = 1.0 / codec.stats.scale(scales[i], t.sigma[i]);
    }
    for row in rows.chunks_exact_mut(d) {
        row.iter_mut().zip(&inverse).for_each(|(x, s)| *x *= s);
    }
    scales
}

/// Replaces each channel's scale code by the one of its candidates whose codes leave the least squared error; see
/// `best_scale` of [`crate::reference`]. Channels of a unit share a width, so that 32 (16) of them advance together.
#[inline(always)]
fn best_scales(codec: &Codec, t: &StreamTables, rows: &[f32], exact: &[bool; BLOCK], scales: &mut [u8]) {
    let d = t.mean.len();
    let channels = d / t.widths.len();
    for (order, &width) in t.order.chunks_exact(channels).zip(&t.widths).filter(|(_, w)| **w > 0) {
        let width = usize::from(width);
        // Columns of the unit, `[token][channel]`, what lies beyond its channels unused.
        let mut x = [[0.0f32; LANES]; BLOCK];
        for (j, x) in x.iter_mut().enumerate() {
            for (x, &c) in x.iter_mut().zip(order) {
                *x = rows[j * d + usize::from(c)];
            }
        }
        let first: [u8; LANES] = std::array::from_fn(|c| order.get(c).map_or(0, |&i| scales[usize::from(i)]));
        let mut best = [f32::INFINITY; LANES];
        for n in 0..SCALE_ATTEMPTS {
            let mut candidate = [None; LANES];
            let mut step: F = [1.0; LANES];
            for (c, &i) in order.iter().enumerate() {
                candidate[c] = codec.stats.candidate(first[c], scales[usize::from(i)], n);
                let scale = codec.stats.scale(candidate[c].unwrap_or(first[c]), t.sigma[usize::from(i)]);
                step[c] = scale * even_step(width);
            }
            let inverse = step.map(|s| 1.0 / s);
            let mut part: [F; 8] = [[0.0; LANES]; 8];
            for j in (0..BLOCK).filter(|&j| !exact[j]) {
                let p = &mut part[j / PART];
                for c in 0..LANES {
                    let e = even_error(x[j][c] * inverse[c] - 0.5, width);
                    p[c] += e * e;
                }
            }
            for (c, &i) in order.iter().enumerate() {
                let p = |w: usize| part[w][c];
                let cost =
                    (((p(0) + p(1)) + (p(2) + p(3))) + ((p(4) + p(5)) + (p(6) + p(7)))) * (step[c] * step[c]);
                if let Some(code) = candidate[c].filter(|_| cost < best[c]) {
                    best[c] = cost;
                    scales[usize::from(i)] = code;
                }
            }
        }
    }
}

#[inline(always)]
fn seal_inner(
    codec: &Codec,
    layer: usize,
    head: usize,
    block: usize,
    k: Rows,
    v: Rows,
    page: &mut [u8],
) -> Result<()> {
    let (t, layout) = (codec.tables(layer, head)?, codec.page_layout(layer)?);
    let d = layout.head_dim;
    let mut keys = vec![0.0; BLOCK * d];
    let mut values = vec![0.0; BLOCK * d];
    page::load_rows("K", (layer, head, block), &k, d, &mut keys)?;
    page::load_rows("V", (layer, head, block), &v, d, &mut values)?;
    let (cos, sin) = codec.rotary.centre(block);
    for row in keys.chunks_exact_mut(d) {
        codec.rotary.to_canonical(row);
        turn_back(row, cos, sin);
    }
    let mut before = keys.clone();
    for (j, row) in before.chunks_exact_mut(d).enumerate() {
        let (cos, sin) = codec.rotary.offset(j);
        turn_back(row, cos, sin);
    }
    values.chunks_exact_mut(d).for_each(hadamard::transform);

    let tokens =
        page::best_tokens(&slot_scores(&before, d, &t.sink_query, codec.stats.calibrated), layout.num_slots);
    let mut exact = [false; BLOCK];
    tokens.iter().for_each(|&j| exact[usize::from(j)] = true);
    let ordinary = (BLOCK - tokens.len()) as f32;

    let (k_means, k_base) = block_means(codec, &t.k, &before, &exact, ordinary);
    let mut base = vec![0.0; d];
    for (j, row) in keys.chunks_exact_mut(d).enumerate() {
        base.copy_from_slice(&k_base);
        let (cos, sin) = codec.rotary.offset(j);
        turn(&mut base, cos, sin);
        row.iter_mut().zip(&base).for_each(|(x, b)| *x -= b);
    }
    let (v_means, v_base) = block_means(codec, &t.v, &values, &exact, ordinary);
    for row in values.chunks_exact_mut(d) {
        row.iter_mut().zip(&v_base).for_each(|(x, b)| *x -= b);
    }
    let k_scales = normalise(codec, &t.k, &mut keys, &exact, ordinary);
    let v_scales = normalise(codec, &t.v, &mut values, &exact, ordinary);

    page.fill(0);
    let v_start = page::v_start(layout, &t.k.widths);
    for (stream, rows, t, start) in
        [(Stream::K, &mut keys, &t.k, layout.codes_offset), (Stream::V, &mut values, &t.v, v_start)]
    {
        let mut slots: Vec<(usize, Vec<f32>)> = Vec::with_capacity(tokens.len());
        for &j in &tokens {
            let row = &mut rows[usize::from(j) * d..][..d];
            slots.push((usize::from(j), t.order.iter().map(|&c| row[usize::from(c)]).collect()));
            row.fill(0.0);
        }
        write_codes(codec, layout, stream, t, start, rows, &mut slots, page);
        for (i, (_, rest)) in slots.iter().enumerate() {
            page::write_slot(layout, page, stream, i, rest);
        }
    }
    let side = &mut page[layout.side_offset..layout.side_offset + layout.side_bytes];
    codec.stats.write(&[k_scales, v_scales].concat(), &[k_means, v_means].concat(), side);
    let mut slots = [0; MAX_SLOTS];
    slots[..tokens.len()].copy_from_slice(&tokens);
    Header { block_index: block as u32, used: tokens.len(), tokens: slots }.write(page);
    Ok(())
}

/// One step of 32 chains at once: z of every lane, the unit it belongs to, its position there.
struct Step {
    z: F,
    unit: usize,
    n: usize,
}

/// Codes one stream into its units. `slots`: exact tokens and their rows in code order, of which the points of the
/// tokens' codes are taken off.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn write_codes(
    codec: &Codec,
    layout: &PageLayout,
    stream: Stream,
    t: &StreamTables,
    start: usize,
    rows: &[f32],
    slots: &mut [(usize, Vec<f32>)],
    page: &mut [u8],
) {
    let d = layout.head_dim;
    let trellis = codec.recipe().quantizer == Quantizer::Trellis;
    let mut steps: Vec<Step> = Vec::with_capacity(MAX_STEPS);
    let mut planes: Vec<(Codes, Codes)> = vec![([[0; LANES]; CODES], [[0; LANES]; CODES]); t.widths.len()];
    for group in 0..layout.unit.groups() {
        steps.clear();
        for (u, _) in t.widths.iter().enumerate().filter(|(_, w)| **w > 0) {
            let order = &t.order[u * layout.unit.channels..(u + 1) * layout.unit.channels];
            for n in 0..CODES {
                let z = std::array::from_fn(|lane| {
                    let (c, j) = place(stream, layout.unit, group, lane, n);
                    rows[j * d + usize::from(order[c])]
                });
                steps.push(Step { z, unit: u, n });
            }
        }
        if trellis {
            encode_trellis(codec, &t.widths, &steps, &mut planes);
        } else {
            for s in &steps {
                planes[s.unit].1[s.n] = nearest(&codec.grids[usize::from(t.widths[s.unit])], &s.z);
            }
        }
        for (j, rest) in slots.iter_mut().filter(|(j, _)| locate(stream, layout.unit, 0, *j).0 == group) {
            take_points_off(codec, layout, stream, &t.widths, &planes, *j, rest);
        }
        for (u, &w) in t.widths.iter().enumerate().filter(|(_, w)| **w > 0) {
            let at = page::unit_offset(start, &t.widths, group, u);
            let out = &mut page[at..at + unit_bytes(w.into())];
            match trellis {
                true => unit::pack_trellis(w.into(), &planes[u].0, &planes[u].1, out),
                false => unit::pack(w.into(), &planes[u].1, out),
            }
        }
    }
}

#[inline(always)]
fn nearest(grid: &Grid, z: &F) -> [u8; LANES] {
    let mut q: I = [0; LANES];
    for &t in &grid.thresholds {
        q.iter_mut().zip(z).for_each(|(q, z)| *q += i32::from(*z > t));
    }
    q.map(|q| q as u8)
}

/// Takes the points of a token's codes off its row, which is in code order. `token`: of the block, in the group of `planes`.
fn take_points_off(
    codec: &Codec,
    layout: &PageLayout,
    stream: Stream,
    widths: &[u8],
    planes: &[(Codes, Codes)],
    token: usize,
    row: &mut [f32],
) {
    let trellis = codec.recipe().quantizer == Quantizer::Trellis;
    let mut state = [0usize; LANES];
    let coded = row.chunks_exact_mut(layout.unit.channels).zip(planes).zip(widths).filter(|(_, w)| **w > 0);
    for ((row, (path, codes)), &w) in coded {
        let mut symbols: Codes = *codes;
        if trellis {
            for n in 0..CODES {
                for lane in 0..LANES {
                    let u = usize::from(path[n][lane]);
                    symbols[n][lane] = 4 * codes[n][lane] + crate::trellis::subset(state[lane], u) as u8;
                    state[lane] = crate::trellis::next(state[lane], u);
                }
            }
        }
        for (channel, x) in row.iter_mut().enumerate() {
            let (_, lane, n) = locate(stream, layout.unit, channel, token);
            *x -= codec.grids[usize::from(w)].points[usize::from(symbols[n][lane])];
        }
    }
}

/// Viterbi search over 32 chains in step; see [`crate::trellis::encode`].
#[inline(always)]
fn encode_trellis(codec: &Codec, widths: &[u8], steps: &[Step], planes: &mut [(Codes, Codes)]) {
    let mut cost: [F; 8] = [[f32::INFINITY; LANES]; 8];
    cost[0] = [0.0; LANES];
    // By step and lane: bit s = the better predecessor of state s is the high one; refinement index of each subset.
    let mut from_high: Vec<I> = vec![[0; LANES]; steps.len()];
    let mut indices: Vec<I> = vec![[0; LANES]; steps.len()];
    for ((step, high), index) in steps.iter().zip(&mut from_high).zip(&mut indices) {
        let grid = &codec.grids[usize::from(widths[step.unit])];
        let per_subset = grid.thresholds.len() / 4;
        let mut d: [F; 4] = [[0.0; LANES]; 4];
        for j in 0..4 {
            let mut q: I = [0; LANES];
            for &t in &grid.thresholds[j * per_subset..(j + 1) * per_subset] {
                q.iter_mut().zip(&step.z).for_each(|(q, z)| *q += i32::from(*z > t));
            }
            for lane in 0..LANES {
                let p = point(grid.symbol_bits, grid.alpha, grid.beta, (4 * q[lane] + j as i32) as u32);
                let e = step.z[lane] - p;
                d[j][lane] = e * e;
                index[lane] |= q[lane] << (INDEX_BITS * j as u32);
            }
        }
        let mut new: [F; 8] = [[0.0; LANES]; 8];
        for s in 0..8 {
            let (u, low) = (s & 1, s >> 1);
            let (da, db) = (&d[crate::trellis::subset(low, u)], &d[crate::trellis::subset(low | 4, u)]);
            for lane in 0..LANES {
                let a = cost[low][lane] + da[lane];
                let b = cost[low | 4][lane] + db[lane];
                let better = b < a;
                new[s][lane] = if better { b } else { a };
                high[lane] |= i32::from(better) << s;
            }
        }
        cost = new;
    }
    let mut state: I = [0; LANES];
    let mut best = cost[0];
    for (s, c) in cost.iter().enumerate().skip(1) {
        for lane in 0..LANES {
            if c[lane] < best[lane] {
                best[lane] = c[lane];
                state[lane] = s as i32;
            }
        }
    }
    for ((step, high), index) in steps.iter().zip(&from_high).zip(&indices).rev() {
        let (path, codes) = &mut planes[step.unit];
        for lane in 0..LANES {
            let s = state[lane];
            let u = s & 1;
            let before = (s >> 1) | (((high[lane] >> s) & 1) << 2);
            let subset = 2 * ((u ^ before ^ (before >> 2)) & 1) + ((before >> 1) & 1);
            path[step.n][lane] = u as u8;
            codes[step.n][lane] = ((index[lane] >> (INDEX_BITS as i32 * subset)) & 31) as u8;
            state[lane] = before;
        }
    }
}

/// Reads one stream's codes as points into rows by channel.
#[inline(always)]
fn read_codes(
    codec: &Codec,
    layout: &PageLayout,
    stream: Stream,
    t: &StreamTables,
    start: usize,
    page: &[u8],
    rows: &mut [f32],
) {
    let d = layout.head_dim;
    let trellis = codec.recipe().quantizer == Quantizer::Trellis;
    let mut codes: Codes = [[0; LANES]; CODES];
    let mut path: Codes = [[0; LANES]; CODES];
    if t.widths.contains(&0) {
        rows.fill(0.0);
    }
    for group in 0..layout.unit.groups() {
        let mut state = [0u8; LANES];
        for (u, &w) in t.widths.iter().enumerate().filter(|(_, w)| **w > 0) {
            let width = usize::from(w);
            let at = page::unit_offset(start, &t.widths, group, u);
            let bytes = &page[at..at + unit_bytes(width)];
            if !trellis {
                unit::unpack(width, bytes, &mut codes);
            } else {
                unit::unpack_trellis(width, bytes, &mut path, &mut codes);
                for (codes, path) in codes.iter_mut().zip(&path) {
                    for lane in 0..LANES {
                        let (s, u) = (state[lane], path[lane]);
                        codes[lane] = (codes[lane] << 2) | (((u ^ s ^ (s >> 2)) & 1) << 1) | ((s >> 1) & 1);
                        state[lane] = ((s << 1) | u) & 7;
                    }
                }
            }
            let points = &codec.grids[width].points;
            let order = &t.order[u * layout.unit.channels..(u + 1) * layout.unit.channels];
            for (n, codes) in codes.iter().enumerate() {
                for (lane, &code) in codes.iter().enumerate() {
                    let (c, j) = place(stream, layout.unit, group, lane, n);
                    rows[j * d + usize::from(order[c])] = points[usize::from(code)];
                }
            }
        }
    }
}

#[inline(always)]
fn open_centred_inner(
    codec: &Codec,
    layer: usize,
    head: usize,
    page: &[u8],
    k: &mut [f32],
    v: &mut [f32],
) -> Result<Header> {
    let (t, layout) = (codec.tables(layer, head)?, codec.page_layout(layer)?);
    let d = layout.head_dim;
    let header = Header::read(codec, layout, page)?;
    read_codes(codec, layout, Stream::K, &t.k, layout.codes_offset, page, k);
    read_codes(codec, layout, Stream::V, &t.v, page::v_start(layout, &t.k.widths), page, v);
    for (i, &j) in header.tokens[..header.used].iter().enumerate() {
        let at = usize::from(j) * d;
        page::read_slot(layout, page, Stream::K, i, |p, x| k[at + usize::from(t.k.order[p])] += x);
        page::read_slot(layout, page, Stream::V, i, |p, x| v[at + usize::from(t.v.order[p])] += x);
    }
    let (mut scales, mut means) = (vec![0; 2 * d], vec![0; 2 * d]);
    codec.stats.read(
        &page[layout.side_offset..layout.side_offset + layout.side_bytes],
        &mut scales,
        &mut means,
    );
    let expand = |t: &StreamTables, at: usize| -> (Vec<f32>, Vec<f32>) {
        (0..d)
            .map(|i| {
                let mean = t.mean[i] + codec.stats.mean_value(means[at + i], t.step[i]);
                (codec.stats.scale(scales[at + i], t.sigma[i]), mean)
            })
            .unzip()
    };
    let (k_scale, k_base) = expand(&t.k, 0);
    let (v_scale, v_base) = expand(&t.v, d);
    let mut base = vec![0.0; d];
    for (j, row) in k.chunks_exact_mut(d).enumerate() {
        base.copy_from_slice(&k_base);
        let (cos, sin) = codec.rotary.offset(j);
        turn(&mut base, cos, sin);
        for ((x, s), b) in row.iter_mut().zip(&k_scale).zip(&base) {
            *x = b + *x * s;
        }
    }
    for row in v.chunks_exact_mut(d) {
        for ((x, s), b) in row.iter_mut().zip(&v_scale).zip(&v_base) {
            *x = b + *x * s;
        }
    }
    Ok(header)
}

#[inline(always)]
fn open_inner(
    codec: &Codec,
    layer: usize,
    head: usize,
    page: &[u8],
    k: &mut [f32],
    v: &mut [f32],
) -> Result<()> {
    let d = codec.shape().head_dim;
    let header = open_centred_inner(codec, layer, head, page, k, v)?;
    let (cos, sin) = codec.rotary.centre(header.block_index as usize);
    for row in k.chunks_exact_mut(d) {
        turn(row, cos, sin);
        codec.rotary.to_natural(row);
    }
    v.chunks_exact_mut(d).for_each(hadamard::transform);
    Ok(())
}
