//! Codecs of small models, from eight bytes: every head dimension, quantiser, ratio, number of slots and manner of rotary
//! embedding, with statistics from the usual to the absurd.

use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

use kakeya_codec::{Codec, ModelShape, Recipe, Rope};
use safetensors::tensor::{Dtype, TensorView};

use crate::common::{self, Noise};
use crate::source::Source;

pub struct Model {
    pub codec: Codec,
    device: OnceCell<Vec<u64>>,
}

impl Model {
    /// The codec's tables for a device, as words.
    pub fn device_tables(&self) -> &[u64] {
        self.device.get_or_init(|| {
            let word = |c: &[u8]| u64::from_le_bytes(std::array::from_fn(|i| *c.get(i).unwrap_or(&0)));
            kakeya_codec::device::tables(&self.codec).chunks(8).map(word).collect()
        })
    }
}

/// Codecs kept from input to input: making one takes longer than most of what is done with it.
const CACHED: usize = 64;

thread_local! {
    static CACHE: RefCell<HashMap<[u8; 8], Option<Rc<Model>>>> = RefCell::new(HashMap::new());
}

/// The model that the next eight bytes describe; `None` where recipe or statistics are refused.
pub fn model(source: &mut Source) -> Option<Rc<Model>> {
    let key = source.array::<8>();
    CACHE.with_borrow_mut(|cache| {
        if cache.len() >= CACHED && !cache.contains_key(&key) {
            cache.clear();
        }
        cache.entry(key).or_insert_with(|| make(key).map(Rc::new)).clone()
    })
}

/// Ratios of the last values of their byte, from 255 down: those of presets, and the ends of what is valid.
const RATIOS: [f64; 7] = [4.6, 6.4, 3.5, 4.0, 5.3, 2.7, 9.0];

fn make(key: [u8; 8]) -> Option<Model> {
    let [what, ratio, slots, rope, statistics, weights, ..] = key;
    let head_dim = [64, 64, 64, 64, 64, 96, 128, 256][usize::from(what & 7)];
    let quantizer = ["uniform", "lloyd-max", "trellis", "trellis"][usize::from(what >> 3 & 3)];
    let calibrated = what & 0x20 == 0;
    let text = format!(
        r#"{{"ratio":{},"quantizer":"{quantizer}","calibrated":{calibrated},"min_slots":{},"sink_slots":{},"k_weight":{},"menu":{}}}"#,
        match RATIOS.get(usize::from(255 - ratio)) {
            Some(published) => *published,
            None => 2.7 + 6.3 * f64::from(ratio) / 255.0,
        },
        slots % 9,
        slots / 16 % 9,
        [6.0, 0.001, 1.0, 1000.0][usize::from(weights & 3)],
        [16, 1, 2, 256][usize::from(weights >> 2 & 3)],
    );
    let recipe = Recipe::parse(&text).expect("all fields are inside their ranges");
    let rotary_dim = [head_dim, 0, head_dim / 2, 2, 8, head_dim, head_dim, head_dim][usize::from(rope & 7)];
    let frequency = |i: usize| match rope >> 3 & 7 {
        0..4 => 1e5f64.powf(-2.0 * i as f64 / rotary_dim as f64),
        4 => 0.0,
        5 => 64.0,
        6 => 1e-9,
        _ => i as f64,
    };
    let shape = ModelShape {
        num_layers: 2,
        num_kv_heads: 2,
        num_q_heads: 4,
        head_dim,
        max_position: 4096,
        rope: (rotary_dim > 0).then(|| Rope {
            rotary_dim,
            interleaved: rope & 0x40 != 0,
            inv_freq: (0..rotary_dim / 2).map(|i| frequency(i).min(64.0)).collect(),
        }),
    };
    let seed = u64::from(u16::from_le_bytes([key[6], key[7]]));
    let artefact = calibrated.then(|| match statistics {
        0..128 => common::artefact(&shape, seed),
        _ => edge_artefact(&shape, statistics, seed),
    });
    let codec = Codec::new(&recipe, &shape, artefact.as_deref()).ok()?;
    Some(Model { codec, device: OnceCell::new() })
}

/// Magnitudes of statistics, from those that no channel has to those that no f32 squares.
const MAGNITUDES: [f32; 12] =
    [0.0, 1e-45, 1e-38, 1e-20, 1e-12, 1e-6, 1.0, 1e4, 16_777_216.0, 281_474_976_710_656.0, 1e30, f32::MAX];

/// An artefact whose statistics are drawn from few magnitudes: bits 0..4 of `how` say from how many, bit 4 and 5 from
/// where on.
fn edge_artefact(shape: &ModelShape, how: u8, seed: u64) -> Vec<u8> {
    let mut noise = Noise(seed);
    let (count, first) = (1 + usize::from(how & 15) % 12, usize::from(how >> 4 & 7) * 2);
    artefact(shape, |name| {
        let n = (noise.uniform() * count as f64) as usize;
        let x = MAGNITUDES[(first + n) % MAGNITUDES.len()];
        if name.ends_with("mean") && noise.uniform() < 0.5 { -x } else { x }
    })
}

/// An artefact with a value of the caller's for every element of every tensor.
pub fn artefact(shape: &ModelShape, mut value: impl FnMut(&str) -> f32) -> Vec<u8> {
    let heads = [shape.num_layers, shape.num_kv_heads];
    let data: Vec<(&str, usize, Vec<u8>)> =
        ["k_mean", "k_var", "q_sq", "q_mean", "v_mean", "v_var", "sink_mass"]
            .into_iter()
            .map(|name| {
                let last = if name == "sink_mass" { 8 } else { shape.head_dim };
                let n = heads[0] * heads[1] * last;
                (name, last, (0..n).flat_map(|_| value(name).to_le_bytes()).collect())
            })
            .collect();
    let views = data.iter().map(|(name, last, bytes)| {
        let view = TensorView::new(Dtype::F32, vec![heads[0], heads[1], *last], bytes);
        (*name, view.expect("as many bytes as the shape says"))
    });
    let metadata = HashMap::from([("format".to_string(), kakeya_codec::calibration::FORMAT.to_string())]);
    safetensors::serialize(views, Some(metadata)).expect("a valid file")
}
