//! Models, calibration artefacts and inputs made on the spot.
#![allow(dead_code)]

use kakeya_codec::{BLOCK, Codec, ModelShape, Recipe, Rope};
use safetensors::tensor::{Dtype, TensorView};
use std::collections::HashMap;

/// Deterministic noise.
pub struct Noise(pub u64);

impl Noise {
    pub fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    pub fn gaussian(&mut self) -> f32 {
        ((-2.0 * self.uniform().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()) as f32
    }
}

/// A Llama-like shape.
pub fn shape(head_dim: usize, interleaved: bool, rotary_dim: usize) -> ModelShape {
    let freq = |i: usize| 1e5f64.powf(-2.0 * i as f64 / rotary_dim as f64);
    ModelShape {
        num_layers: 2,
        num_kv_heads: 2,
        num_q_heads: 6,
        head_dim,
        max_position: 4096,
        rope: (rotary_dim > 0).then(|| Rope {
            rotary_dim,
            interleaved,
            inv_freq: (0..rotary_dim / 2).map(freq).collect(),
        }),
    }
}

/// An artefact with uneven channels; layer 1 has several sinks a block.
pub fn artefact(s: &ModelShape, seed: u64) -> Vec<u8> {
    let mut noise = Noise(seed);
    let n = s.num_layers * s.num_kv_heads * s.head_dim;
    let mut tensor = |f: &dyn Fn(f32) -> f32| -> Vec<u8> {
        (0..n).flat_map(|_| f(noise.gaussian()).to_le_bytes()).collect()
    };
    let spread = |g: f32| (1.2 * g).exp();
    let mut data: Vec<(&str, Vec<u8>)> = vec![
        ("k_mean", tensor(&|g| 2.0 * g)),
        ("k_var", tensor(&spread)),
        ("q_sq", tensor(&spread)),
        ("q_mean", tensor(&|g| g)),
        ("v_mean", tensor(&|g| 0.1 * g)),
        ("v_var", tensor(&|g| (0.3 * g).exp())),
    ];
    let mass = (0..s.num_layers * s.num_kv_heads * 8).flat_map(|i| {
        let e: f32 = if i / (s.num_kv_heads * 8) == 1 { 0.1 } else { 0.01 };
        e.to_le_bytes()
    });
    data.push(("sink_mass", mass.collect()));
    let shape_of =
        |name: &str| vec![s.num_layers, s.num_kv_heads, if name == "sink_mass" { 8 } else { s.head_dim }];
    let views = data.iter().map(|(n, d)| (*n, TensorView::new(Dtype::F32, shape_of(n), d).unwrap()));
    let meta = HashMap::from([("format".to_string(), "kakeya-calibration-1".to_string())]);
    safetensors::serialize(views, Some(meta)).unwrap()
}

/// A codec of a preset, with an artefact where it wants one.
pub fn codec(recipe: &str, s: &ModelShape) -> Codec {
    let recipe = Recipe::parse(recipe).unwrap();
    let bytes = artefact(s, 7);
    Codec::new(&recipe, s, recipe.calibrated.then_some(&bytes[..])).unwrap()
}

/// Rows of a block drawn from the artefact's own distribution, K turned to its positions.
pub fn natural_block(c: &Codec, layer: usize, head: usize, block: usize, seed: u64) -> (Vec<f32>, Vec<f32>) {
    let (t, d, mut noise) = (c.tables(layer, head).unwrap(), c.shape().head_dim, Noise(seed));
    let (mut k, mut v) = (vec![0.0; BLOCK * d], vec![0.0; BLOCK * d]);
    for j in 0..BLOCK {
        let position = (block * BLOCK + j) as f64;
        // step is an eighth of the deviation before rotary embedding.
        let mut row: Vec<f32> = (0..d).map(|i| t.k.mean[i] + 8.0 * t.k.step[i] * noise.gaussian()).collect();
        turn_by(c.shape(), &mut row, position);
        k[j * d..(j + 1) * d].copy_from_slice(&row);
        for x in &mut v[j * d..(j + 1) * d] {
            *x = noise.gaussian();
        }
    }
    (k, v)
}

/// Rotary embedding of a canonical row, result in natural order.
pub fn turn_by(s: &ModelShape, row: &mut [f32], position: f64) {
    let Some(r) = &s.rope else { return };
    let h = r.inv_freq.len();
    let copy = row.to_vec();
    for (i, f) in r.inv_freq.iter().enumerate() {
        let (sin, cos) = (position * f).sin_cos();
        let (a, b) = (f64::from(copy[i]), f64::from(copy[i + h]));
        let (x, y) = ((a * cos - b * sin) as f32, (b * cos + a * sin) as f32);
        let (ia, ib) = if r.interleaved { (2 * i, 2 * i + 1) } else { (i, i + h) };
        (row[ia], row[ib]) = (x, y);
    }
}

/// Root mean square error over root mean square.
pub fn relative(a: &[f32], b: &[f32]) -> f64 {
    let e: f64 = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum();
    let n: f64 = a.iter().map(|a| f64::from(*a).powi(2)).sum();
    (e / n.max(1e-300)).sqrt()
}
