//! Seal and open, one element at a time, in the order of docs/page-format.md: the oracle that every fast implementation
//! is compared with, bit for bit.

use crate::codec::{Codec, StreamTables};
use crate::error::Result;
use crate::grid::{Grid, even_error, even_step};
use crate::hadamard;
use crate::layout::PageLayout;
use crate::page::{self, Header};
use crate::recipe::{MAX_SLOTS, Quantizer};
use crate::rotary::{turn, turn_back};
use crate::rows::Rows;
use crate::shape::BLOCK;
use crate::stats::{SCALE_ATTEMPTS, block_sum};
use crate::trellis;
use crate::unit::{self, CODES, Codes, LANES, Stream, place, unit_bytes};

/// Rows of a block: `[token][channel]`.
type Block = Vec<Vec<f32>>;

/// Sum of products in eight interleaved partial sums, combined as a tree.
fn dot(a: impl Iterator<Item = f32>, b: impl Iterator<Item = f32>) -> f32 {
    let mut p = [0.0f32; 8];
    for (i, (x, y)) in a.zip(b).enumerate() {
        p[i % 8] += x * y;
    }
    ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7]))
}

/// How much each token wants an exact slot: its product with the calibrated mean query, or, without calibration, its
/// squared distance from the block's mean in deviations of the block, over the channels that hardly turn.
fn slot_scores(before: &Block, sink_query: &[f32], calibrated: bool) -> [f32; BLOCK] {
    if calibrated {
        return std::array::from_fn(|j| dot(sink_query.iter().copied(), before[j].iter().copied()));
    }
    let n = BLOCK as f32;
    let d = before[0].len();
    let mean: Vec<f32> = (0..d).map(|i| block_sum(|j| before[j][i]) / n).collect();
    let square = |j: usize, i: usize| (before[j][i] - mean[i]) * (before[j][i] - mean[i]);
    // The tiny addend keeps constant channels from dividing by zero.
    let inverse: Vec<f32> =
        (0..d).map(|i| sink_query[i] / (block_sum(|j| square(j, i)) / n + 1e-12)).collect();
    std::array::from_fn(|j| dot((0..d).map(|i| square(j, i)), inverse.iter().copied()))
}

/// One stream of a page before it is written: codes' input z in code order, and the coded statistics by channel.
struct Coded {
    /// `[token][position in code order]`, unit variance.
    z: Block,
    scales: Vec<u8>,
    means: Vec<u16>,
}

/// Block mean of each channel over the ordinary tokens: codes and `calibrated mean + coded block mean`.
fn block_means(codec: &Codec, t: &StreamTables, rows: &Block, exact: &[bool; BLOCK]) -> (Vec<u16>, Vec<f32>) {
    let ordinary = exact.iter().filter(|e| !**e).count() as f32;
    (0..t.mean.len())
        .map(|i| {
            let sum = block_sum(|j| if exact[j] { 0.0 } else { rows[j][i] - t.mean[i] });
            let (code, value) = codec.stats.mean(sum / ordinary, t.step[i]);
            (code, t.mean[i] + value)
        })
        .unzip()
}

/// The scale code of a channel, of those beside the deviation's, by which an even grid of the channel's width leaves the least
/// squared error over the ordinary tokens; the earlier candidate of equal ones. The even grid stands for the other quantisers
/// too: on Gaussian and heavier tails its choice leaves within 5 % of what their own best scale would, and the path of a
/// trellis is known too late.
fn best_scale(codec: &Codec, width: u8, code: u8, sigma: f32, of: impl Fn(usize) -> Option<f32>) -> u8 {
    if width == 0 {
        return code;
    }
    let width = usize::from(width);
    let mut best = (code, f32::INFINITY);
    for n in 0..SCALE_ATTEMPTS {
        let Some(candidate) = codec.stats.candidate(code, best.0, n) else { continue };
        let step = codec.stats.scale(candidate, sigma) * even_step(width);
        let inverse = 1.0 / step;
        let sum = block_sum(|j| {
            of(j).map_or(0.0, |x| {
                let e = even_error(x * inverse - 0.5, width);
                e * e
            })
        });
        let cost = sum * (step * step);
        if cost < best.1 {
            best = (candidate, cost);
        }
    }
    best.0
}

/// Normalises residuals by their coded block scales and puts them into code order.
fn normalise(
    codec: &Codec,
    t: &StreamTables,
    residual: &Block,
    exact: &[bool; BLOCK],
    means: Vec<u16>,
) -> Coded {
    let d = t.mean.len();
    let ordinary = exact.iter().filter(|e| !**e).count() as f32;
    let mut scales = vec![0; d];
    let mut z = vec![vec![0.0; d]; BLOCK];
    for (position, &channel) in t.order.iter().enumerate() {
        let i = usize::from(channel);
        let square = block_sum(|j| if exact[j] { 0.0 } else { residual[j][i] * residual[j][i] });
        let width = t.widths[position * t.widths.len() / d];
        let code = codec.stats.scale_code(square / ordinary, t.sigma[i]);
        scales[i] =
            best_scale(
                codec,
                width,
                code,
                t.sigma[i],
                |j| if exact[j] { None } else { Some(residual[j][i]) },
            );
        let inverse = 1.0 / codec.stats.scale(scales[i], t.sigma[i]);
        for j in 0..BLOCK {
            z[j][position] = residual[j][i] * inverse;
        }
    }
    Coded { z, scales, means }
}

/// Codes one stream into its units.
fn write_codes(
    codec: &Codec,
    layout: &PageLayout,
    stream: Stream,
    widths: &[u8],
    start: usize,
    z: &dyn Fn(usize, usize) -> f32,
    page: &mut [u8],
) {
    let trellis = codec.recipe().quantizer == Quantizer::Trellis;
    for group in 0..layout.unit.groups() {
        let mut planes: Vec<(Codes, Codes)> = vec![([[0; LANES]; CODES], [[0; LANES]; CODES]); widths.len()];
        for lane in 0..LANES {
            let mut steps: Vec<(usize, usize, f32, &Grid)> = Vec::new();
            for (u, &w) in widths.iter().enumerate().filter(|(_, w)| **w > 0) {
                for n in 0..CODES {
                    let (c, j) = place(stream, layout.unit, group, lane, n);
                    let x = z(j, u * layout.unit.channels + c);
                    steps.push((u, n, x, &codec.grids[usize::from(w)]));
                }
            }
            if trellis {
                let chain: Vec<(f32, &Grid)> = steps.iter().map(|s| (s.2, s.3)).collect();
                for ((u, n, _, _), (path, refinement)) in steps.iter().zip(trellis::encode(&chain)) {
                    planes[*u].0[*n][lane] = path;
                    planes[*u].1[*n][lane] = refinement;
                }
            } else {
                for (u, n, x, grid) in steps {
                    planes[u].1[n][lane] = grid.nearest(x) as u8;
                }
            }
        }
        for (u, &w) in widths.iter().enumerate().filter(|(_, w)| **w > 0) {
            let at = page::unit_offset(start, widths, group, u);
            let (path, codes) = &planes[u];
            let out = &mut page[at..at + unit_bytes(w.into())];
            match trellis {
                true => unit::pack_trellis(w.into(), path, codes, out),
                false => unit::pack(w.into(), codes, out),
            }
        }
    }
}

/// Seals a block; see [`Codec::seal`].
pub fn seal(
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
    let mut raw = vec![0.0; BLOCK * d];
    let mut load = |stream, rows: &Rows| -> Result<Block> {
        page::load_rows(stream, (layer, head, block), rows, d, &mut raw)?;
        Ok(raw.chunks_exact(d).map(<[f32]>::to_vec).collect())
    };
    let mut keys = load("K", &k)?;
    let mut values = load("V", &v)?;

    // K in the frame of the block's centre, and as it was before rotary embedding (up to the centre's turn).
    let (cos, sin) = codec.rotary.centre(block);
    for row in &mut keys {
        codec.rotary.to_canonical(row);
        turn_back(row, cos, sin);
    }
    let mut before = keys.clone();
    for (j, row) in before.iter_mut().enumerate() {
        let (cos, sin) = codec.rotary.offset(j);
        turn_back(row, cos, sin);
    }
    for row in &mut values {
        hadamard::transform(row);
    }

    let tokens =
        page::best_tokens(&slot_scores(&before, &t.sink_query, codec.stats.calibrated), layout.num_slots);
    let mut exact = [false; BLOCK];
    tokens.iter().for_each(|&j| exact[usize::from(j)] = true);

    // What is left after the mean, which turns with the token.
    let (k_means, k_base) = block_means(codec, &t.k, &before, &exact);
    for (j, row) in keys.iter_mut().enumerate() {
        let mut base = k_base.clone();
        let (cos, sin) = codec.rotary.offset(j);
        turn(&mut base, cos, sin);
        row.iter_mut().zip(&base).for_each(|(x, b)| *x -= b);
    }
    let (v_means, v_base) = block_means(codec, &t.v, &values, &exact);
    for row in &mut values {
        row.iter_mut().zip(&v_base).for_each(|(x, b)| *x -= b);
    }
    let k = normalise(codec, &t.k, &keys, &exact, k_means);
    let v = normalise(codec, &t.v, &values, &exact, v_means);

    page.fill(0);
    let start = layout.codes_offset;
    let input = |z: &Block, j: usize, p: usize| if exact[j] { 0.0 } else { z[j][p] };
    write_codes(codec, layout, Stream::K, &t.k.widths, start, &|j, p| input(&k.z, j, p), page);
    let start = page::v_start(layout, &t.k.widths);
    write_codes(codec, layout, Stream::V, &t.v.widths, start, &|j, p| input(&v.z, j, p), page);
    let side = &mut page[layout.side_offset..layout.side_offset + layout.side_bytes];
    codec.stats.write(&[&k.scales[..], &v.scales].concat(), &[&k.means[..], &v.means].concat(), side);
    // Exact tokens went into the codes as zeros; their slots hold what is to be added to those codes' points.
    let v_start = page::v_start(layout, &t.k.widths);
    for (stream, coded, tables, start) in
        [(Stream::K, &k, &t.k, layout.codes_offset), (Stream::V, &v, &t.v, v_start)]
    {
        let points = read_codes(codec, layout, stream, &tables.widths, start, page);
        for (i, &j) in tokens.iter().enumerate() {
            let (z, points) = (&coded.z[usize::from(j)], &points[usize::from(j)]);
            let rest: Vec<f32> = z.iter().zip(points).map(|(z, p)| z - p).collect();
            page::write_slot(layout, page, stream, i, &rest);
        }
    }
    let mut slots = [0; MAX_SLOTS];
    slots[..tokens.len()].copy_from_slice(&tokens);
    Header { block_index: block as u32, used: tokens.len(), tokens: slots }.write(page);
    Ok(())
}

/// Reads one stream's codes as points, `[token][position in code order]`.
fn read_codes(
    codec: &Codec,
    layout: &PageLayout,
    stream: Stream,
    widths: &[u8],
    start: usize,
    page: &[u8],
) -> Block {
    let trellis = codec.recipe().quantizer == Quantizer::Trellis;
    let mut z = vec![vec![0.0; layout.head_dim]; BLOCK];
    for group in 0..layout.unit.groups() {
        let mut state = [0usize; LANES];
        for (u, &w) in widths.iter().enumerate().filter(|(_, w)| **w > 0) {
            let width = usize::from(w);
            let at = page::unit_offset(start, widths, group, u);
            let bytes = &page[at..at + unit_bytes(width)];
            let grid = &codec.grids[width];
            let mut codes: Codes = [[0; LANES]; CODES];
            let mut path = codes;
            match trellis {
                true => unit::unpack_trellis(width, bytes, &mut path, &mut codes),
                false => unit::unpack(width, bytes, &mut codes),
            }
            for n in 0..CODES {
                for lane in 0..LANES {
                    let mut symbol = usize::from(codes[n][lane]);
                    if trellis {
                        let bit = usize::from(path[n][lane]);
                        symbol = 4 * symbol + trellis::subset(state[lane], bit);
                        state[lane] = trellis::next(state[lane], bit);
                    }
                    let (c, j) = place(stream, layout.unit, group, lane, n);
                    z[j][u * layout.unit.channels + c] = grid.points[symbol];
                }
            }
        }
    }
    z
}

/// Opens a page; see [`Codec::open`].
pub fn open(
    codec: &Codec,
    layer: usize,
    head: usize,
    page: &[u8],
    k: &mut [f32],
    v: &mut [f32],
) -> Result<()> {
    let (t, layout) = (codec.tables(layer, head)?, codec.page_layout(layer)?);
    let d = layout.head_dim;
    let header = Header::read(codec, layout, page)?;
    let mut kz = read_codes(codec, layout, Stream::K, &t.k.widths, layout.codes_offset, page);
    let mut vz = read_codes(codec, layout, Stream::V, &t.v.widths, page::v_start(layout, &t.k.widths), page);
    for (i, &j) in header.tokens[..header.used].iter().enumerate() {
        let j = usize::from(j);
        page::read_slot(layout, page, Stream::K, i, |p, x| kz[j][p] += x);
        page::read_slot(layout, page, Stream::V, i, |p, x| vz[j][p] += x);
    }
    let (mut scales, mut means) = (vec![0; 2 * d], vec![0; 2 * d]);
    codec.stats.read(
        &page[layout.side_offset..layout.side_offset + layout.side_bytes],
        &mut scales,
        &mut means,
    );
    let base = |t: &StreamTables, means: &[u16]| -> Vec<f32> {
        (0..d).map(|i| t.mean[i] + codec.stats.mean_value(means[i], t.step[i])).collect()
    };
    let (k_base, v_base) = (base(&t.k, &means[..d]), base(&t.v, &means[d..]));
    let (cos, sin) = codec.rotary.centre(header.block_index as usize);
    for j in 0..BLOCK {
        let row = &mut k[j * d..(j + 1) * d];
        row.copy_from_slice(&k_base);
        let offset = codec.rotary.offset(j);
        turn(row, offset.0, offset.1);
        for (p, &i) in t.k.order.iter().enumerate() {
            let i = usize::from(i);
            row[i] += kz[j][p] * codec.stats.scale(scales[i], t.k.sigma[i]);
        }
        turn(row, cos, sin);
        codec.rotary.to_natural(row);
        let row = &mut v[j * d..(j + 1) * d];
        row.copy_from_slice(&v_base);
        for (p, &i) in t.v.order.iter().enumerate() {
            let i = usize::from(i);
            row[i] += vz[j][p] * codec.stats.scale(scales[d + i], t.v.sigma[i]);
        }
        hadamard::transform(row);
    }
    Ok(())
}
