//! Write and attend as a serving engine calls them.

mod common;

use common::Noise;
use kakeya_codec::step::{AttendArgs, AttendOptions, Pages, WriteArgs, attend, write};
use kakeya_codec::{BLOCK, Codec, Elements, ElementsMut, Error, Tensor};

/// A cache of one layer with a few open blocks and one growing sequence over scattered blocks.
struct Engine {
    c: Codec,
    heads: usize,
    pages: Vec<u8>,
    open: Vec<f32>,
    open_slot: Vec<i32>,
    table: Vec<i32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

const NUM_BLOCKS: usize = 12;
const NUM_OPEN: usize = 3;

impl Engine {
    fn new(c: Codec, tokens: usize) -> Engine {
        let (heads, d) = (c.shape().num_kv_heads, c.shape().head_dim);
        let (mut k, mut v) = (vec![0.0; tokens * heads * d], vec![0.0; tokens * heads * d]);
        for h in 0..heads {
            for b in 0..tokens.div_ceil(BLOCK) {
                let (kb, vb) = common::natural_block(&c, 0, h, b, (17 * b + h) as u64);
                for j in 0..BLOCK.min(tokens - b * BLOCK) {
                    let at = ((b * BLOCK + j) * heads + h) * d;
                    k[at..at + d].copy_from_slice(&kb[j * d..(j + 1) * d]);
                    v[at..at + d].copy_from_slice(&vb[j * d..(j + 1) * d]);
                }
            }
        }
        let pages = vec![0xcc; NUM_BLOCKS * heads * c.page_bytes()];
        let open = vec![f32::NAN; NUM_OPEN * 2 * heads * BLOCK * d];
        let table = vec![7, 2, 9, 4, 11, 1, 3, 5];
        Engine { c, heads, pages, open, open_slot: vec![-1; NUM_BLOCKS], table, k, v }
    }

    fn tensor<'a>(&self, x: &'a [f32], from: usize) -> Tensor<'a> {
        let d = self.c.shape().head_dim;
        Tensor {
            data: Elements::F32(&x[from * self.heads * d..]),
            token_stride: self.heads * d,
            head_stride: d,
        }
    }

    fn write(&mut self, from: usize, to: usize) -> Result<(), Error> {
        let slots: Vec<i64> = (from..to)
            .map(|p| i64::from(self.table[p / BLOCK]) * BLOCK as i64 + (p % BLOCK) as i64)
            .collect();
        let positions: Vec<i32> = (from..to).map(|p| p as i32).collect();
        let (k, v) = (self.k.clone(), self.v.clone());
        let (k, v) = (self.tensor(&k, from), self.tensor(&v, from));
        let bytes = self.c.page_bytes();
        write(
            &self.c,
            &mut WriteArgs {
                layer: 0,
                first_head: 0,
                num_heads: self.heads,
                num_tokens: to - from,
                k,
                v,
                slot_mapping: &slots,
                positions: &positions,
                pages: &mut self.pages,
                num_blocks: NUM_BLOCKS,
                page_block_stride: self.heads * bytes,
                page_head_stride: bytes,
                open_blocks: ElementsMut::F32(&mut self.open),
                num_open: NUM_OPEN,
                open_slot: &self.open_slot,
            },
        )
    }

    /// Attention of tokens from..to (already written), q as given `[to - from][q heads][d]`.
    fn attend(&self, q: &[f32], from: usize, to: usize, sealed: bool) -> (Vec<f32>, Vec<f32>) {
        self.attend_with(q, from, to, sealed, AttendOptions::default()).unwrap()
    }

    fn attend_with(
        &self,
        q: &[f32],
        from: usize,
        to: usize,
        sealed: bool,
        options: AttendOptions,
    ) -> Result<(Vec<f32>, Vec<f32>), Error> {
        let (d, hq, n) = (self.c.shape().head_dim, self.c.shape().num_q_heads, to - from);
        let mut out = vec![f32::NAN; n * hq * d];
        let mut lse = vec![f32::NAN; n * hq];
        let bytes = self.c.page_bytes();
        attend(
            &self.c,
            &mut AttendArgs {
                layer: 0,
                first_head: 0,
                num_kv_heads: self.heads,
                num_q_heads: hq,
                num_tokens: n,
                scale: 1.0 / (d as f32).sqrt(),
                sealed_prefill: sealed,
                q: Tensor { data: Elements::F32(q), token_stride: hq * d, head_stride: d },
                k: self.tensor(&self.k, from),
                v: self.tensor(&self.v, from),
                out: ElementsMut::F32(&mut out),
                out_token_stride: hq * d,
                out_head_stride: d,
                query_start: &[0, n as i32],
                seq_lens: &[to as i32],
                block_table: &self.table,
                block_table_stride: self.table.len(),
                max_blocks_per_seq: self.table.len(),
                pages: Pages {
                    bytes: &self.pages,
                    num_blocks: NUM_BLOCKS,
                    block_stride: self.heads * bytes,
                    head_stride: bytes,
                },
                open_blocks: Elements::F32(&self.open),
                num_open: NUM_OPEN,
                open_slot: &self.open_slot,
                lse: Some(&mut lse),
                options,
            },
        )
        .map(|()| (out, lse))
    }

    fn page(&self, block: i32, head: usize) -> &[u8] {
        let bytes = self.c.page_bytes();
        &self.pages[(block as usize * self.heads + head) * bytes..][..bytes]
    }

    /// Keys and values of a head as a query at `position` sees them: pages opened up to block `pages`, the rest raw.
    fn seen(&self, head: usize, position: usize, pages: usize) -> Vec<(Vec<f32>, Vec<f32>)> {
        let d = self.c.shape().head_dim;
        let mut rows = Vec::new();
        for b in 0..pages {
            let (mut k, mut v) = (vec![0.0; BLOCK * d], vec![0.0; BLOCK * d]);
            self.c.open_reference(0, head, self.page(self.table[b], head), &mut k, &mut v).unwrap();
            rows.extend((0..BLOCK).map(|j| (k[j * d..(j + 1) * d].to_vec(), v[j * d..(j + 1) * d].to_vec())));
        }
        for p in pages * BLOCK..=position {
            let at = (p * self.heads + head) * d;
            rows.push((self.k[at..at + d].to_vec(), self.v[at..at + d].to_vec()));
        }
        rows
    }
}

fn queries(c: &Codec, n: usize, seed: u64) -> Vec<f32> {
    let mut noise = Noise(seed);
    (0..n * c.shape().num_q_heads * c.shape().head_dim).map(|_| noise.gaussian()).collect()
}

/// fp64 attention of one query row over rows of keys and values.
fn exact(q: &[f32], seen: &[(Vec<f32>, Vec<f32>)]) -> (Vec<f64>, f64) {
    exact_with(q, seen, 0.0, f64::NEG_INFINITY)
}

/// The same with a soft cap (0: none) and a sink.
fn exact_with(q: &[f32], seen: &[(Vec<f32>, Vec<f32>)], cap: f64, sink: f64) -> (Vec<f64>, f64) {
    let scale = 1.0 / (q.len() as f64).sqrt();
    let s: Vec<f64> = seen
        .iter()
        .map(|(k, _)| scale * q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>())
        .map(|x| if cap > 0.0 { cap * (x / cap).tanh() } else { x })
        .collect();
    let max = s.iter().copied().fold(sink, f64::max);
    let sum: f64 = s.iter().map(|s| (s - max).exp()).sum::<f64>() + (sink - max).exp();
    let mut out = vec![0.0; q.len()];
    for (s, (_, v)) in s.iter().zip(seen) {
        out.iter_mut().zip(v).for_each(|(o, v)| *o += (s - max).exp() / sum * f64::from(*v));
    }
    (out, max + sum.ln())
}

#[test]
fn token_by_token_equals_at_once() {
    for recipe in ["kakeya-4.6x-trellis", "kakeya-free-5.3x"] {
        for cuts in
            [vec![300], vec![128, 256, 300], (1..=300).collect::<Vec<_>>(), vec![100, 200, 256, 257, 300]]
        {
            let mut whole = Engine::new(common::codec(recipe, &common::shape(64, false, 64)), 300);
            let mut parts = Engine::new(common::codec(recipe, &common::shape(64, false, 64)), 300);
            whole.open_slot[9] = 0; // block index 2 stays open
            whole.write(0, 300).unwrap();
            let mut from = 0;
            for to in cuts {
                // Open blocks for the first and last block that this step leaves partial, as the engine would give them.
                parts.open_slot.fill(-1);
                for p in [from, to - 1] {
                    let b = parts.table[p / BLOCK] as usize;
                    parts.open_slot[b] = (p / BLOCK % NUM_OPEN) as i32;
                }
                parts.write(from, to).unwrap();
                from = to;
            }
            for b in [7, 2] {
                for h in 0..2 {
                    assert_eq!(whole.page(b, h), parts.page(b, h), "{recipe} block {b}");
                }
            }
            assert!(whole.page(9, 0).iter().all(|x| *x == 0xcc), "an open block has no page");
        }
    }
}

#[test]
fn attention_is_that_of_the_opened_pages() {
    for (recipe, d, interleaved, rotary) in [
        ("kakeya-4.6x-trellis", 64, false, 64),
        ("kakeya-free-4.6x", 128, true, 64),
        ("kakeya-5.3x-lloyd-max", 96, false, 0),
    ] {
        for (tokens, from) in [(1, 0), (128, 127), (129, 128), (300, 0), (300, 140), (300, 299), (700, 513)] {
            for sealed in [false, true] {
                let mut e =
                    Engine::new(common::codec(recipe, &common::shape(d, interleaved, rotary)), tokens);
                for step in [(0, from), (from, tokens)] {
                    if step.0 == step.1 {
                        continue;
                    }
                    for p in [step.0, step.1 - 1] {
                        e.open_slot[e.table[p / BLOCK] as usize] = (p / BLOCK % NUM_OPEN) as i32;
                    }
                    e.write(step.0, step.1).unwrap();
                    if step.1 == from {
                        let keep = e.table[from / BLOCK] as usize;
                        for b in 0..NUM_BLOCKS {
                            if b != keep {
                                e.open_slot[b] = -1;
                            }
                        }
                    }
                }
                let q = queries(&e.c, tokens - from, 77);
                let (out, lse) = e.attend(&q, from, tokens, sealed);
                let hq = e.c.shape().num_q_heads;
                let mut worst = 0.0f64;
                for p in (from..tokens).step_by(37).chain([tokens - 1]) {
                    let pages = if sealed { p / BLOCK } else { from / BLOCK };
                    for h in 0..hq {
                        let r = (p - from) * hq + h;
                        let (want, want_lse) = exact(&q[r * d..(r + 1) * d], &e.seen(h / 3, p, pages));
                        let got: Vec<f64> = out[r * d..(r + 1) * d].iter().map(|x| f64::from(*x)).collect();
                        let num: f64 = got.iter().zip(&want).map(|(a, b)| (a - b) * (a - b)).sum();
                        let den: f64 = want.iter().map(|x| x * x).sum();
                        worst = worst.max((num / den).sqrt());
                        assert!((want_lse - f64::from(lse[r])).abs() < 1e-4 * want_lse.abs().max(1.0));
                    }
                }
                assert!(worst < 1e-4, "{recipe} D={d} {tokens} from {from} sealed {sealed}: {worst}");
            }
        }
    }
}

/// A soft cap bends scores before the softmax; a sink takes its share of the sum, more than all keys where it is large.
#[test]
fn soft_caps_and_sinks() {
    let d = 64;
    let mut e = Engine::new(common::codec("kakeya-4.6x", &common::shape(d, false, d)), 300);
    e.open_slot[e.table[2] as usize] = 0;
    e.write(0, 299).unwrap();
    e.write(299, 300).unwrap();
    let hq = e.c.shape().num_q_heads;
    let q: Vec<f32> = queries(&e.c, 300, 5).iter().map(|x| 4.0 * x).collect();
    let sinks: Vec<f32> = (0..hq).map(|h| [-3.0, 0.5, 9.0, 200.0][h % 4]).collect();
    for (cap, sinks) in [(2.5f32, None), (0.0, Some(&sinks[..])), (30.0, Some(&sinks[..]))] {
        for (from, sealed) in [(299, false), (299, true), (0, false)] {
            let options = AttendOptions { soft_cap: cap, sinks };
            let q = &q[..(300 - from) * hq * d];
            let (out, lse) = e.attend_with(q, from, 300, sealed, options).unwrap();
            for h in 0..hq {
                let r = (299 - from) * hq + h;
                let sink = sinks.map_or(f64::NEG_INFINITY, |sinks| f64::from(sinks[h]));
                let seen = e.seen(h / 3, 299, from / BLOCK);
                let (want, want_lse) = exact_with(&q[r * d..(r + 1) * d], &seen, cap.into(), sink);
                for (got, want) in out[r * d..(r + 1) * d].iter().zip(&want) {
                    assert!((f64::from(*got) - want).abs() < 1e-4, "cap {cap} sink {sink}: {got} {want}");
                }
                assert!((want_lse - f64::from(lse[r])).abs() < 1e-4 * want_lse.abs().max(1.0));
            }
        }
    }
    let refused =
        |soft_cap, sinks| e.attend_with(&q[..hq * d], 299, 300, false, AttendOptions { soft_cap, sinks });
    for cap in [-1.0, f32::NAN, f32::INFINITY] {
        assert!(matches!(refused(cap, None), Err(Error::OutOfRange { what: "soft_cap", .. })));
    }
    let mut bad = sinks.clone();
    bad[1] = f32::NAN;
    assert!(matches!(refused(0.0, Some(&bad)), Err(Error::OutOfRange { what: "sinks", .. })));
    assert!(matches!(refused(0.0, Some(&sinks[1..])), Err(Error::BufferTooSmall { what: "sinks", .. })));
}

/// With sealed prefill the result does not depend on how the prompt was cut into steps.
#[test]
fn sealed_prefill_is_invariant_to_chunking() {
    let run = |cuts: &[usize]| {
        let mut e = Engine::new(common::codec("kakeya-4.6x", &common::shape(64, false, 64)), 420);
        let q = queries(&e.c, 420, 5);
        let (mut from, mut outs) = (0, Vec::new());
        for &to in cuts {
            for (i, p) in [from, to - 1].into_iter().enumerate() {
                let b = e.table[p / BLOCK] as usize;
                if e.open_slot[b] < 0 {
                    let taken: Vec<i32> = e.open_slot.clone();
                    e.open_slot[b] = (0..3).find(|s| !taken.contains(s)).unwrap_or(i as i32);
                }
            }
            e.write(from, to).unwrap();
            let w = e.c.shape().num_q_heads * 64;
            outs.extend(e.attend(&q[from * w..to * w], from, to, true).0);
            for b in 0..NUM_BLOCKS {
                if b != e.table[(to - 1) / BLOCK] as usize {
                    e.open_slot[b] = -1;
                }
            }
            from = to;
        }
        outs
    };
    let whole = run(&[420]);
    for cuts in [vec![128, 256, 420], vec![100, 140, 300, 301, 420], vec![1, 2, 256, 420]] {
        let parts = run(&cuts);
        assert!(common::relative(&whole, &parts) < 1e-6, "{cuts:?}");
    }
}

#[test]
fn a_partial_block_without_open_block_is_refused_and_nothing_written() {
    let mut e = Engine::new(common::codec("kakeya-4.6x", &common::shape(64, false, 64)), 300);
    let before = (e.pages.clone(), e.open.len());
    assert!(matches!(e.write(0, 300), Err(Error::NoOpenSlot { block: 9, .. })));
    assert_eq!(before.0, e.pages);
    assert!(e.open.iter().all(|x| x.is_nan()));
    e.open_slot[9] = 0;
    e.k[200 * 128] = f32::NAN;
    assert!(matches!(e.write(0, 300), Err(Error::NonFinite { token: 72, .. })));
    assert_eq!(before.0, e.pages);
    assert!(e.open.iter().all(|x| x.is_nan()));
}

/// A page that belongs elsewhere in the sequence is noticed, not read.
#[test]
fn a_page_at_the_wrong_place_is_refused() {
    let mut e = Engine::new(common::codec("kakeya-4.6x", &common::shape(64, false, 64)), 300);
    e.open_slot[9] = 0;
    e.write(0, 300).unwrap();
    e.table.swap(0, 1);
    let (d, n) = (64, 1);
    let q = queries(&e.c, 1, 1);
    let mut out = vec![7.0; 6 * d];
    let bytes = e.c.page_bytes();
    let r = attend(
        &e.c,
        &mut AttendArgs {
            layer: 0,
            first_head: 0,
            num_kv_heads: 2,
            num_q_heads: 6,
            num_tokens: n,
            scale: 0.125,
            sealed_prefill: false,
            q: Tensor { data: Elements::F32(&q), token_stride: 6 * d, head_stride: d },
            k: e.tensor(&e.k, 299),
            v: e.tensor(&e.v, 299),
            out: ElementsMut::F32(&mut out),
            out_token_stride: 6 * d,
            out_head_stride: d,
            query_start: &[0, 1],
            seq_lens: &[300],
            block_table: &e.table,
            block_table_stride: 8,
            max_blocks_per_seq: 8,
            pages: Pages {
                bytes: &e.pages,
                num_blocks: NUM_BLOCKS,
                block_stride: 2 * bytes,
                head_stride: bytes,
            },
            open_blocks: Elements::F32(&e.open),
            num_open: NUM_OPEN,
            open_slot: &e.open_slot,
            lse: None,
            options: AttendOptions::default(),
        },
    );
    assert!(matches!(r, Err(Error::BadPage(_))), "{r:?}");
    assert!(out.iter().all(|x| *x == 7.0));
}
