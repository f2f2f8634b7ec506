//! Codecs of small models, made once a process: what the targets work on.

use kakeya_codec::{BLOCK, Codec, ModelShape, Recipe, Rope, Rows};
use safetensors::tensor::{Dtype, TensorView};
use std::collections::HashMap;
use std::sync::OnceLock;

/// A codec with what targets need beside it.
pub struct Model {
    pub codec: Codec,
    /// `kakeya_codec::device::tables`, as words.
    pub tables: Vec<u64>,
    /// A valid page of each layer, of head 0 and block 0.
    pub sealed: Vec<Vec<u8>>,
}

/// All quantisers, calibrated and free, three head dimensions.
pub fn models() -> &'static [Model] {
    static MODELS: OnceLock<Vec<Model>> = OnceLock::new();
    MODELS.get_or_init(|| {
        let mut made = Vec::new();
        for (name, head_dim) in [
            ("kakeya-4.6x", 64),
            ("kakeya-4.6x-trellis", 64),
            ("kakeya-4.6x-lloyd-max", 64),
            ("kakeya-free-4.6x", 64),
            ("kakeya-free-4.6x-trellis", 64),
            ("kakeya-6.4x-trellis", 96),
            ("kakeya-5.3x", 128),
            ("kakeya-2.7x", 64),
            ("kakeya-9.0x", 64),
        ] {
            made.push(model(name, head_dim));
        }
        made
    })
}

fn model(name: &str, head_dim: usize) -> Model {
    let s = shape(head_dim);
    let recipe = Recipe::parse(name).expect("a preset");
    let bytes = artefact(&s, 7);
    let codec = Codec::new(&recipe, &s, recipe.calibrated.then_some(&bytes[..])).expect("a valid codec");
    let rows: Vec<f32> = (0..BLOCK * head_dim).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.05).collect();
    let sealed = (0..s.num_layers)
        .map(|layer| {
            let mut page = vec![0; codec.page_bytes()];
            let rows = Rows::dense(&rows, head_dim);
            codec.seal(layer, 0, 0, rows, rows, &mut page).expect("finite rows");
            page
        })
        .collect();
    Model { tables: crate::tables_of(&codec), codec, sealed }
}

/// Two layers of two KV heads.
pub fn shape(head_dim: usize) -> ModelShape {
    ModelShape {
        num_layers: 2,
        num_kv_heads: 2,
        num_q_heads: 4,
        head_dim,
        max_position: 4096,
        rope: Some(Rope {
            rotary_dim: head_dim,
            interleaved: head_dim == 96,
            inv_freq: (0..head_dim / 2).map(|i| 1e5f64.powf(-2.0 * i as f64 / head_dim as f64)).collect(),
        }),
    }
}

/// An artefact with uneven channels; layer 1 has several sinks a block.
pub fn artefact(s: &ModelShape, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut noise = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u32 << 24) as f32 * 4.0 - 2.0
    };
    let n = s.num_layers * s.num_kv_heads * s.head_dim;
    let mut tensor =
        |f: &dyn Fn(f32) -> f32| -> Vec<u8> { (0..n).flat_map(|_| f(noise()).to_le_bytes()).collect() };
    let mut data: Vec<(&str, Vec<u8>)> = vec![
        ("k_mean", tensor(&|x| 2.0 * x)),
        ("k_var", tensor(&|x| x.exp())),
        ("q_sq", tensor(&|x| x.exp())),
        ("q_mean", tensor(&|x| x)),
        ("v_mean", tensor(&|x| 0.1 * x)),
        ("v_var", tensor(&|x| (0.3 * x).exp())),
    ];
    let mass = (0..s.num_layers * s.num_kv_heads * 8)
        .flat_map(|i| (if i / (s.num_kv_heads * 8) == 1 { 0.1f32 } else { 0.01 }).to_le_bytes());
    data.push(("sink_mass", mass.collect()));
    let dims =
        |name: &str| vec![s.num_layers, s.num_kv_heads, if name == "sink_mass" { 8 } else { s.head_dim }];
    let views = data.iter().map(|(n, d)| (*n, TensorView::new(Dtype::F32, dims(n), d).unwrap()));
    let meta = HashMap::from([("format".to_string(), "kakeya-calibration-1".to_string())]);
    safetensors::serialize(views, Some(meta)).unwrap()
}

/// Bytes as 64-bit words, the last one filled up with zeros.
pub fn words(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks(8).map(|c| u64::from_le_bytes(std::array::from_fn(|i| *c.get(i).unwrap_or(&0)))).collect()
}
