//! A codec: a recipe bound to a model and, where the recipe wants it, a calibration. Immutable; all static tables that a
//! page refers to, and nothing else, live here.

use crate::calibration::{Calibration, HeadStats};
use crate::error::{Error, Result, check_index};
use crate::grid::{Grid, MAX_WIDTH, distortion};
use crate::layout::PageLayout;
use crate::recipe::Recipe;
use crate::rotary::{CENTRE, Rotary};
use crate::rows::Rows;
use crate::shape::{BLOCK, ModelShape};
use crate::stats::StatsCoder;
use crate::widths::{self, Widths};
use sha2::{Digest, Sha256};

/// One stream's static tables of one KV head. Channels are canonical (K) or Hadamard order (V).
#[derive(Debug, Clone)]
pub struct StreamTables {
    /// Calibrated mean; K's before rotary embedding.
    pub mean: Vec<f32>,
    /// Step of the block mean: an eighth of the calibrated deviation; K's before rotary embedding.
    pub step: Vec<f32>,
    /// Deviation of the residual that is coded; K's in the frame of the block's centre.
    pub sigma: Vec<f32>,
    /// Channel at each position of the code order: heaviest first.
    pub order: Vec<u16>,
    /// Width of each unit, in code order.
    pub widths: Vec<u8>,
}

/// Static tables of one KV head of one layer.
#[derive(Debug, Clone)]
pub struct HeadTables {
    pub k: StreamTables,
    pub v: StreamTables,
    /// What scores a token for an exact slot, from its key before rotary embedding (canonical order), on the channels that
    /// hardly turn: sinks live there. Calibrated: the mean query, for a product. Free: 1 or 0, for a squared distance.
    pub sink_query: Vec<f32>,
}

/// A recipe bound to a model.
#[derive(Debug)]
pub struct Codec {
    recipe: Recipe,
    shape: ModelShape,
    layouts: Vec<PageLayout>,
    heads: Vec<HeadTables>,
    pub(crate) rotary: Rotary,
    pub(crate) stats: StatsCoder,
    /// Alphabets by width; index 0 is a placeholder that no unit uses.
    pub(crate) grids: Vec<Grid>,
    fingerprint: String,
}

/// Deviations below this are taken for it: a channel that never moved in calibration must not divide by zero.
const MIN_SIGMA: f32 = 1e-6;
/// Channels that turn less than 2 radians over this many tokens carry the sink score.
const SINK_SPAN: f64 = 2048.0;
/// Distances over which a query is averaged in the frame of a block's centre.
const QUERY_SPAN: usize = 2048;
/// Attention probability on the third and fourth best-scored tokens of all blocks above which they count as sinks. On the
/// models measured, layers with several sinks hold 6 to 14 % there, all others below 4 %.
const SINK_MASS: f32 = 0.045;

impl Codec {
    /// Binds `recipe` to a model. `calibration`: the artefact's bytes, needed by calibrated recipes, refused by free ones.
    pub fn new(recipe: &Recipe, shape: &ModelShape, calibration: Option<&[u8]>) -> Result<Codec> {
        let calibration = match (recipe.calibrated, calibration) {
            (true, Some(bytes)) => Some(Calibration::parse(bytes, shape)?),
            (true, None) => {
                return Err(Error::CalibrationRequired {
                    recipe: recipe.name.clone(),
                    alternative: recipe.name.replacen("kakeya-", "kakeya-free-", 1),
                });
            }
            (false, Some(_)) => {
                return Err(Error::BadCalibration(format!(
                    "recipe '{}' takes no calibration file",
                    recipe.name
                )));
            }
            (false, None) => None,
        };
        let page_bytes = recipe.page_bytes(shape.head_dim)?;
        let layouts = (0..shape.num_layers)
            .map(|l| {
                PageLayout::new(recipe, shape.head_dim, page_bytes, slots_of(recipe, calibration.as_ref(), l))
            })
            .collect::<Result<Vec<_>>>()?;
        let rotary = Rotary::new(shape);
        let heads = build_heads(recipe, shape, &rotary, &layouts, calibration.as_ref());
        let grids = (0..=MAX_WIDTH).map(|w| Grid::new(recipe.quantizer, w.max(1))).collect();
        let stats = StatsCoder::new(recipe.calibrated, shape.head_dim, rotary.pairs);
        let fingerprint = fingerprint(recipe, shape, &layouts, &heads);
        Ok(Codec {
            recipe: recipe.clone(),
            shape: shape.clone(),
            layouts,
            heads,
            rotary,
            stats,
            grids,
            fingerprint,
        })
    }

    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    pub fn shape(&self) -> &ModelShape {
        &self.shape
    }

    /// Bytes of a page, the same for every layer and head.
    pub fn page_bytes(&self) -> usize {
        self.layouts[0].page_bytes
    }

    /// SHA-256 over every static table that a page refers to, hex: two sides that exchange pages compare it.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Layout of a layer's pages.
    pub fn page_layout(&self, layer: usize) -> Result<&PageLayout> {
        check_index("layer", layer, self.layouts.len())?;
        Ok(&self.layouts[layer])
    }

    /// Static tables of a head.
    pub fn tables(&self, layer: usize, head: usize) -> Result<&HeadTables> {
        check_index("layer", layer, self.shape.num_layers)?;
        check_index("KV head", head, self.shape.num_kv_heads)?;
        Ok(&self.heads[layer * self.shape.num_kv_heads + head])
    }

    /// Seals one block of one KV head. `k`, `v`: 128 rows of head_dim, K after rotary embedding; `block_index`: position of
    /// the first token / 128. `page` must have exactly [`Codec::page_bytes`] bytes; untouched on error.
    pub fn seal(
        &self,
        layer: usize,
        head: usize,
        block_index: usize,
        k: Rows,
        v: Rows,
        page: &mut [u8],
    ) -> Result<()> {
        self.check_seal(layer, head, block_index, &k, &v, page)?;
        crate::fast::seal(self, layer, head, block_index, k, v, page)
    }

    /// [`Codec::seal`], by the scalar implementation that reads like the document: the oracle. Same bytes.
    pub fn seal_reference(
        &self,
        layer: usize,
        head: usize,
        block_index: usize,
        k: Rows,
        v: Rows,
        page: &mut [u8],
    ) -> Result<()> {
        self.check_seal(layer, head, block_index, &k, &v, page)?;
        crate::reference::seal(self, layer, head, block_index, k, v, page)
    }

    fn check_seal(
        &self,
        layer: usize,
        head: usize,
        block: usize,
        k: &Rows,
        v: &Rows,
        page: &[u8],
    ) -> Result<()> {
        self.tables(layer, head)?;
        check_index("block index", block, self.shape.max_blocks())?;
        k.check("keys of a block", BLOCK, self.shape.head_dim)?;
        v.check("values of a block", BLOCK, self.shape.head_dim)?;
        if page.len() != self.page_bytes() {
            return Err(Error::BufferTooSmall { what: "page", have: page.len(), need: self.page_bytes() });
        }
        Ok(())
    }

    /// Opens a page: `k`, `v` receive 128 rows of head_dim, K after rotary embedding at the page's own position. Total:
    /// any bytes give values or an error.
    pub fn open(&self, layer: usize, head: usize, page: &[u8], k: &mut [f32], v: &mut [f32]) -> Result<()> {
        self.check_open(layer, head, page, k, v)?;
        crate::fast::open(self, layer, head, page, k, v)
    }

    /// [`Codec::open`] by the scalar implementation. Same values.
    pub fn open_reference(
        &self,
        layer: usize,
        head: usize,
        page: &[u8],
        k: &mut [f32],
        v: &mut [f32],
    ) -> Result<()> {
        self.check_open(layer, head, page, k, v)?;
        crate::reference::open(self, layer, head, page, k, v)
    }

    fn check_open(&self, layer: usize, head: usize, page: &[u8], k: &[f32], v: &[f32]) -> Result<()> {
        self.tables(layer, head)?;
        if page.len() != self.page_bytes() {
            return Err(Error::BadPage(format!(
                "{} bytes; this recipe's pages have {}",
                page.len(),
                self.page_bytes()
            )));
        }
        let need = BLOCK * self.shape.head_dim;
        for (what, have) in [("keys", k.len()), ("values", v.len())] {
            if have != need {
                return Err(Error::BufferTooSmall { what, have, need });
            }
        }
        Ok(())
    }

    /// What was built, for logs and reports.
    pub fn describe(&self) -> serde_json::Value {
        let layers: Vec<_> = (0..self.shape.num_layers)
            .map(|l| {
                let heads: Vec<_> = (0..self.shape.num_kv_heads)
                    .map(|h| {
                        let t = &self.heads[l * self.shape.num_kv_heads + h];
                        serde_json::json!({ "k_widths": t.k.widths, "v_widths": t.v.widths })
                    })
                    .collect();
                let p = &self.layouts[l];
                serde_json::json!({ "slots": p.num_slots, "code_bits": p.code_bits, "widths": heads })
            })
            .collect();
        let raw = 4 * self.shape.head_dim * BLOCK;
        serde_json::json!({
            "name": self.recipe.name,
            "recipe": self.recipe.to_json(),
            "quantizer": self.recipe.quantizer,
            "page_bytes": self.page_bytes(),
            "ratio": raw as f64 / self.page_bytes() as f64,
            "bits_per_element": 16.0 * self.page_bytes() as f64 / raw as f64,
            "fingerprint": self.fingerprint,
            "block_tokens": BLOCK,
            "layers": layers,
        })
    }
}

/// Exact slots that a layer asks for: `sink_slots` where calibration found that attention rests on more tokens of a block than
/// the best-scored one or two, which `min_slots` holds anyway.
fn slots_of(recipe: &Recipe, calibration: Option<&Calibration>, layer: usize) -> usize {
    match calibration.and_then(|c| c.sink_mass(layer, 2..4)) {
        Some(mass) if mass > SINK_MASS => recipe.sink_slots,
        _ => recipe.min_slots,
    }
}

/// Mean of cos^2 over angles `a * freq`: the share of a channel's variance that stays in it.
fn mean_cos_squared(angles: impl Iterator<Item = f64>, freq: f64) -> f64 {
    let (mut sum, mut n) = (0.0, 0);
    for a in angles {
        let c = libm::cos(a * freq);
        sum += c * c;
        n += 1;
    }
    sum / f64::from(n)
}

/// Second moments of pairs after they turned by a spread of angles: each member keeps `share` of its own.
fn mix(second: &[f64], share: &[f64]) -> Vec<f64> {
    let (pairs, mut out) = (share.len(), second.to_vec());
    for (i, s) in share.iter().enumerate() {
        let (a, b) = (second[i], second[i + pairs]);
        out[i] = s * a + (1.0 - s) * b;
        out[i + pairs] = s * b + (1.0 - s) * a;
    }
    out
}

/// Indices by descending weight; equal weights keep their order.
fn descending(weight: &[f64]) -> Vec<u16> {
    let mut order: Vec<u16> = (0..weight.len() as u16).collect();
    order.sort_by(|&a, &b| weight[usize::from(b)].total_cmp(&weight[usize::from(a)]));
    order
}

/// Geometric mean of the weights of each unit, in code order.
fn unit_weights(weight: &[f64], order: &[u16], channels: usize, factor: f64) -> Vec<f64> {
    order
        .chunks(channels)
        .map(|unit| {
            let log: f64 = unit.iter().map(|&c| weight[usize::from(c)].max(1e-30).ln()).sum();
            factor * (log / channels as f64).exp()
        })
        .collect()
}

struct Draft {
    tables: HeadTables,
    weight: Vec<f64>,
}

fn build_heads(
    recipe: &Recipe,
    shape: &ModelShape,
    rotary: &Rotary,
    layouts: &[PageLayout],
    calibration: Option<&Calibration>,
) -> Vec<HeadTables> {
    let freq: &[f64] = shape.rope.as_ref().map_or(&[], |r| &r.inv_freq);
    let key_share: Vec<f64> =
        freq.iter().map(|&f| mean_cos_squared((0..BLOCK).map(|j| j as f64 - CENTRE), f)).collect();
    let query_share: Vec<f64> =
        freq.iter().map(|&f| mean_cos_squared((0..QUERY_SPAN).map(|d| d as f64), f)).collect();
    let mut drafts = Vec::new();
    let mut budgets = Vec::new();
    for (layer, layout) in layouts.iter().enumerate() {
        for head in 0..shape.num_kv_heads {
            let draft = match calibration {
                Some(c) => {
                    calibrated(recipe, layout, rotary, freq, &key_share, &query_share, &c.head(layer, head))
                }
                None => free(recipe, layout, freq),
            };
            budgets.push(widths::Head { weight: draft.weight.clone(), bits: layout.code_bits });
            drafts.push(draft);
        }
    }
    let chosen: Vec<Widths> = widths::assign(&budgets, distortion(recipe.quantizer), recipe.menu);
    drafts
        .into_iter()
        .zip(chosen)
        .map(|(mut d, w)| {
            // Tables that broke this would be decoded wrongly by the GPU kernels, without a sign.
            assert!([&w.k, &w.v].iter().all(|w| w.is_sorted_by(|a, b| a >= b)), "widths rise: {w:?}");
            d.tables.k.widths = w.k;
            d.tables.v.widths = w.v;
            d.tables
        })
        .collect()
}

fn calibrated(
    recipe: &Recipe,
    layout: &PageLayout,
    rotary: &Rotary,
    freq: &[f64],
    key_share: &[f64],
    query_share: &[f64],
    stats: &HeadStats,
) -> Draft {
    let canonical = |values: &[f32]| {
        let mut row = values.to_vec();
        rotary.to_canonical(&mut row);
        row
    };
    let wide = |values: &[f32]| values.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
    let normalised = |mut w: Vec<f64>| {
        let mean = w.iter().sum::<f64>() / w.len() as f64;
        w.iter_mut().for_each(|x| *x /= mean.max(1e-30));
        w
    };
    let sigma = |var: &[f64]| var.iter().map(|v| (v.sqrt() as f32).max(MIN_SIGMA)).collect::<Vec<f32>>();
    let step = |sigma: &[f32]| sigma.iter().map(|s| s * 0.125).collect::<Vec<f32>>();

    let k_var = wide(&canonical(stats.k_var));
    let k_centred = mix(&k_var, key_share);
    let q_centred = mix(&wide(&canonical(stats.q_sq)), query_share);
    let k_weight = normalised(k_centred.iter().zip(&q_centred).map(|(v, q)| v * q).collect());
    let k_order = descending(&k_weight);
    let v_var = wide(stats.v_var);
    let v_weight = normalised(v_var.clone());
    let v_order = descending(&v_weight);
    let channels = layout.unit.channels;
    let mut weight = unit_weights(&k_weight, &k_order, channels, recipe.k_weight);
    weight.extend(unit_weights(&v_weight, &v_order, channels, 1.0));

    let mut sink_query = canonical(stats.q_mean);
    keep_slow_channels(&mut sink_query, freq);
    let v_sigma = sigma(&v_var);
    let k = StreamTables {
        mean: canonical(stats.k_mean),
        step: step(&sigma(&k_var)),
        sigma: sigma(&k_centred),
        order: k_order,
        widths: Vec::new(),
    };
    let v = StreamTables {
        mean: stats.v_mean.to_vec(),
        step: step(&v_sigma),
        sigma: v_sigma,
        order: v_order,
        widths: Vec::new(),
    };
    Draft { tables: HeadTables { k, v, sink_query }, weight }
}

/// Zeroes the channels that turn faster than [`SINK_SPAN`] allows, unless that would leave none.
fn keep_slow_channels(weight: &mut [f32], freq: &[f64]) {
    let fast = |f: &f64| f * SINK_SPAN >= 2.0;
    if 2 * freq.len() == weight.len() && freq.iter().all(fast) {
        return;
    }
    for (i, _) in freq.iter().enumerate().filter(|(_, f)| fast(f)) {
        weight[i] = 0.0;
        weight[i + freq.len()] = 0.0;
    }
}

fn free(recipe: &Recipe, layout: &PageLayout, freq: &[f64]) -> Draft {
    let d = layout.head_dim;
    let mut sink_query = vec![1.0; d];
    keep_slow_channels(&mut sink_query, freq);
    let stream = StreamTables {
        mean: vec![0.0; d],
        step: vec![1.0; d],
        sigma: vec![1.0; d],
        order: (0..d as u16).collect(),
        widths: Vec::new(),
    };
    let mut weight = vec![recipe.k_weight; layout.units()];
    weight.extend(vec![1.0; layout.units()]);
    Draft { tables: HeadTables { k: stream.clone(), v: stream, sink_query }, weight }
}

fn fingerprint(recipe: &Recipe, shape: &ModelShape, layouts: &[PageLayout], heads: &[HeadTables]) -> String {
    let mut h = Sha256::new();
    h.update(crate::layout::MAGIC.to_le_bytes());
    h.update(serde_json::to_vec(&(recipe.quantizer, recipe.calibrated, shape)).expect("plain data"));
    for l in layouts {
        h.update((l.code_bits as u64).to_le_bytes());
        h.update((l.num_slots as u64).to_le_bytes());
    }
    for t in heads {
        for s in [&t.k, &t.v] {
            for values in [&s.mean, &s.step, &s.sigma] {
                h.update(bytemuck::cast_slice::<f32, u8>(values));
            }
            h.update(bytemuck::cast_slice::<u16, u8>(&s.order));
            h.update(&s.widths);
        }
    }
    h.finalize().iter().map(|b| format!("{b:02x}")).collect()
}
