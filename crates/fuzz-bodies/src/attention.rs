//! Attention over pages as the codec computes it, and the same in f64 over rows.

use kakeya_codec::step::{AttendArgs, AttendOptions, Pages, attend};
use kakeya_codec::{Codec, Elements, ElementsMut, Result, Tensor};

/// Query heads that share the KV head.
const GROUP: usize = 2;

/// What one query token sees: the pages of a sequence's blocks in order, then its own key and value.
pub struct Query<'a> {
    pub codec: &'a Codec,
    pub layer: usize,
    pub head: usize,
    /// The pages, one behind the other.
    pub pages: &'a [u8],
    /// Queries `[2][head_dim]`, and key and value of the token itself.
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
}

impl Query<'_> {
    fn scale(&self) -> f32 {
        1.0 / (self.k.len() as f32).sqrt()
    }

    /// Attention by the codec: rows `[2][head_dim]` and their log-sum-exp. Panics if an error comes with outputs that changed.
    pub fn attend(&self) -> Result<(Vec<f32>, Vec<f32>)> {
        let (d, bytes) = (self.k.len(), self.codec.page_bytes());
        let blocks = self.pages.len() / bytes;
        let own = |data| Tensor { data: Elements::F32(data), token_stride: d, head_stride: d };
        let (mut out, mut lse) = (vec![7.0; GROUP * d], vec![7.0; GROUP]);
        let table: Vec<i32> = (0..blocks as i32).collect();
        let mut padded = table.clone();
        padded.push(0);
        let result = attend(
            self.codec,
            &mut AttendArgs {
                layer: self.layer,
                first_head: self.head,
                num_kv_heads: 1,
                num_q_heads: GROUP,
                num_tokens: 1,
                scale: self.scale(),
                sealed_prefill: false,
                q: Tensor { data: Elements::F32(self.q), token_stride: GROUP * d, head_stride: d },
                k: own(self.k),
                v: own(self.v),
                out: ElementsMut::F32(&mut out),
                out_token_stride: GROUP * d,
                out_head_stride: d,
                query_start: &[0, 1],
                seq_lens: &[(blocks * kakeya_codec::BLOCK + 1) as i32],
                block_table: &padded,
                block_table_stride: padded.len(),
                max_blocks_per_seq: padded.len(),
                pages: Pages {
                    bytes: self.pages,
                    num_blocks: blocks,
                    block_stride: bytes,
                    head_stride: bytes,
                },
                open_blocks: Elements::F32(&[]),
                num_open: 0,
                open_slot: &vec![-1; blocks],
                lse: Some(&mut lse),
                options: AttendOptions::default(),
            },
        );
        if result.is_err() {
            assert!(out.iter().chain(&lse).all(|x| *x == 7.0), "outputs changed: {result:?}");
        }
        result.map(|()| (out, lse))
    }

    /// Compares with attention in f64 over `keys` and `values`, rows of the opened pages. Numbers that overflow f32 on the way
    /// are not compared.
    pub fn compare(&self, keys: &[f32], values: &[f32], (out, lse): &(Vec<f32>, Vec<f32>)) {
        let d = self.k.len();
        let norm = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        for (i, q) in self.q.chunks_exact(d).enumerate() {
            let rows = || keys.chunks_exact(d).chain([self.k]);
            let dot = |k: &[f32]| q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
            let scores: Vec<f64> = rows().map(|k| f64::from(self.scale()) * dot(k)).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
            let mut want = vec![0.0; d];
            let mut largest = 0.0f64;
            for (s, v) in scores.iter().zip(values.chunks_exact(d).chain([self.v])) {
                want.iter_mut().zip(v).for_each(|(o, v)| *o += (s - max).exp() / sum * f64::from(*v));
                largest = largest.max(norm(v));
            }
            // The tests of the codec allow 1e-4 for scores of their size; what f32 loses grows with the products' size.
            let reach = rows().map(norm).fold(0.0, f64::max) * norm(q) * f64::from(self.scale());
            let bound = 1e-4 + reach * 2f64.powi(-19);
            if !(reach < 1e30 && largest < 1e30) {
                continue;
            }
            let off = out[i * d..(i + 1) * d].iter().zip(&want).map(|(a, b)| (f64::from(*a) - b).powi(2));
            let off = off.sum::<f64>().sqrt();
            // Below f32's normal numbers every sum of a row's terms is rounded to a multiple of 2^-149.
            let subnormal = scores.len() as f64 * (d as f64).sqrt() * 2f64.powi(-149);
            // A bound above the values themselves says nothing any more.
            assert!(
                off <= bound * largest + subnormal || bound > 1.0,
                "row {i}: off by {off}, values up to {largest}, bound {bound}"
            );
            let want = max + sum.ln();
            let off = (f64::from(lse[i]) - want).abs();
            assert!(
                off <= bound * want.abs().max(1.0),
                "row {i}: log-sum-exp {} for {want}, bound {bound}",
                lse[i]
            );
        }
    }
}
