//! A recipe is data: everything that decides how a page is laid out and filled, and nothing about a model.
//!
//! A name says the capacity ratio, all bytes counted, and the quantiser: `kakeya-4.6x`, `kakeya-5.3x-trellis`. A JSON object
//! overrides single fields: `{"base": "kakeya-4.6x", "quantizer": "trellis"}`.

use crate::error::{Error, Result};
use crate::layout::PageLayout;
use crate::shape::BLOCK;
use serde::{Deserialize, Serialize};

/// How a normalised channel becomes a code; see [`crate::grid`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Quantizer {
    Uniform,
    LloydMax,
    Trellis,
}

/// What a page is made of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    pub name: String,
    /// Capacity against bf16: a page takes at most 1/ratio of the bytes of its keys and values.
    pub ratio: f64,
    pub quantizer: Quantizer,
    /// Whether static tables (means, deviations, widths, sink query) come from a calibration file. Without it a page
    /// carries wider block statistics and every unit of a stream has nearly the same width.
    pub calibrated: bool,
    /// Exact slots that every page has at least.
    pub min_slots: usize,
    /// Exact slots of layers in which calibration finds more than one sink token a block.
    pub sink_slots: usize,
    /// Weight of K's error against V's in the width allocation (optimum is flat between 3 and 8).
    pub k_weight: f64,
    /// Most (K widths, V widths) pairs that the heads of a model may use: a kernel compiles one body for each.
    pub menu: usize,
}

/// Recipe file: any field of a recipe over a named base.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RecipeFile {
    #[serde(default = "default_name")]
    base: String,
    name: Option<String>,
    ratio: Option<f64>,
    quantizer: Option<Quantizer>,
    calibrated: Option<bool>,
    min_slots: Option<usize>,
    sink_slots: Option<usize>,
    k_weight: Option<f64>,
    menu: Option<usize>,
}

/// Preset taken when nothing is asked for.
pub const DEFAULT_RECIPE: &str = "kakeya-4.6x";

fn default_name() -> String {
    DEFAULT_RECIPE.to_string()
}

/// Ratios whose quality is published; any other within [`VALID_RATIOS`] may be named too.
const RATIOS: [&str; 5] = ["3.5", "4.0", "4.6", "5.3", "6.4"];
/// Below, six bits a channel would leave bytes unused; above, the budget does not reach one bit.
const VALID_RATIOS: std::ops::RangeInclusive<f64> = 2.7..=9.0;
const RUNGS: [(&str, Quantizer); 3] =
    [("", Quantizer::Uniform), ("-lloyd-max", Quantizer::LloydMax), ("-trellis", Quantizer::Trellis)];

/// Bytes of a recipe's text; all fields together take less than 400.
const MAX_TEXT: usize = 1 << 16;

/// Exact slots that a page header can index.
pub const MAX_SLOTS: usize = 8;

impl Recipe {
    /// Names of all presets.
    pub fn presets() -> Vec<String> {
        let mut names = Vec::new();
        for family in ["kakeya-", "kakeya-free-"] {
            for ratio in RATIOS {
                names.extend(RUNGS.iter().map(|(rung, _)| format!("{family}{ratio}x{rung}")));
            }
        }
        names
    }

    /// The recipe that a name such as `kakeya-4.6x-trellis` stands for; the ratio has one or two decimals.
    fn named(name: &str) -> Option<Recipe> {
        let (calibrated, rest) = match name.strip_prefix("kakeya-free-") {
            Some(rest) => (false, rest),
            None => (true, name.strip_prefix("kakeya-")?),
        };
        let (ratio, rung) = rest.split_once('x')?;
        let (whole, decimals) = ratio.split_once('.')?;
        let digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        if !digits(whole) || !digits(decimals) || whole.len() > 1 || decimals.len() > 2 {
            return None;
        }
        let ratio: f64 = ratio.parse().ok()?;
        let (_, quantizer) = RUNGS.iter().find(|(suffix, _)| rung == *suffix)?;
        VALID_RATIOS.contains(&ratio).then(|| Recipe {
            name: name.to_string(),
            ratio,
            quantizer: *quantizer,
            calibrated,
            // Without calibration nothing tells which layers have many sinks: every page keeps four.
            min_slots: if calibrated { 1 } else { 4 },
            sink_slots: 4,
            k_weight: 6.0,
            menu: 16,
        })
    }

    /// A name, or a JSON object with fields to override, in up to 64 KiB.
    pub fn parse(text: &str) -> Result<Recipe> {
        if text.len() > MAX_TEXT {
            return Err(Error::BadRecipe(format!("a text of {} bytes; valid: up to {MAX_TEXT}", text.len())));
        }
        let text = text.trim();
        let lookup = |name: &str| {
            Recipe::named(name).ok_or_else(|| {
                Error::BadRecipe(format!(
                    "no recipe is named '{name}'; valid: {}, and other ratios from {} to {} with one or two decimals",
                    Recipe::presets().join(", "),
                    VALID_RATIOS.start(),
                    VALID_RATIOS.end()
                ))
            })
        };
        if !text.starts_with('{') {
            return lookup(text);
        }
        let file: RecipeFile = serde_json::from_str(text).map_err(|e| Error::BadRecipe(e.to_string()))?;
        let base = lookup(&file.base)?;
        let recipe = Recipe {
            name: file.name.unwrap_or_else(|| format!("{} (modified)", base.name)),
            ratio: file.ratio.unwrap_or(base.ratio),
            quantizer: file.quantizer.unwrap_or(base.quantizer),
            calibrated: file.calibrated.unwrap_or(base.calibrated),
            min_slots: file.min_slots.unwrap_or(base.min_slots),
            sink_slots: file.sink_slots.unwrap_or(base.sink_slots),
            k_weight: file.k_weight.unwrap_or(base.k_weight),
            menu: file.menu.unwrap_or(base.menu),
        };
        recipe.check()?;
        Ok(recipe)
    }

    fn check(&self) -> Result<()> {
        let bad = |m: String| Err(Error::BadRecipe(m));
        if !VALID_RATIOS.contains(&self.ratio) {
            return bad(format!("ratio is {}; valid: {VALID_RATIOS:?}", self.ratio));
        }
        if self.min_slots > MAX_SLOTS || self.sink_slots > MAX_SLOTS {
            return bad(format!(
                "min_slots {} or sink_slots {} is above {MAX_SLOTS}",
                self.min_slots, self.sink_slots
            ));
        }
        if !(1e-3..=1e3).contains(&self.k_weight) {
            return bad(format!("k_weight is {}; valid: 0.001..=1000", self.k_weight));
        }
        if !(1..=256).contains(&self.menu) {
            return bad(format!("menu is {}; valid: 1..=256", self.menu));
        }
        if self.name.is_empty() || self.name.len() > 128 {
            return bad("name must have 1..=128 bytes".to_string());
        }
        Ok(())
    }

    /// Bytes of one page: one KV head's keys and values of one block. The same for every layer and head.
    pub fn page_bytes(&self, head_dim: usize) -> Result<usize> {
        if !crate::shape::HEAD_DIMS.contains(&head_dim) {
            return Err(Error::Unsupported(format!(
                "head_dim {head_dim}; valid: {:?}",
                crate::shape::HEAD_DIMS
            )));
        }
        // 2 streams * 2 bytes * BLOCK tokens, floored to the 16 bytes that bulk copies and vector loads want.
        let bytes = (4 * head_dim * BLOCK) as f64 / self.ratio;
        let bytes = (bytes / 16.0).floor() as usize * 16;
        PageLayout::new(self, head_dim, bytes, self.min_slots)?;
        PageLayout::new(self, head_dim, bytes, self.sink_slots)?;
        Ok(bytes)
    }

    /// The recipe with all fields resolved, for logs and reports.
    pub fn to_json(&self) -> serde_json::Value {
        let mut v = serde_json::to_value(self).expect("a recipe is plain data");
        v["needs_calibration"] = self.calibrated.into();
        v
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_parses_and_keeps_its_ratio() {
        for name in Recipe::presets().into_iter().chain(["kakeya-4.75x-trellis".to_string()]) {
            let r = Recipe::parse(&name).unwrap();
            for d in crate::shape::HEAD_DIMS {
                let bytes = r.page_bytes(d).unwrap();
                let ratio = (4 * d * BLOCK) as f64 / bytes as f64;
                assert!(ratio >= r.ratio && ratio < r.ratio * 1.01, "{name} D={d}: {ratio}");
                for slots in [r.min_slots, r.sink_slots] {
                    let l = PageLayout::new(&r, d, bytes, slots).unwrap();
                    // What vector loads of a kernel want.
                    assert!(
                        l.side_offset.is_multiple_of(16) && l.slots_offset.is_multiple_of(16),
                        "{name} D={d}: {l:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn refusals_name_the_field_and_the_choice() {
        for (text, part) in [
            ("kakeya-9.1x", "kakeya-4.6x"),
            ("kakeya-4x", "from 2.7 to 9"),
            ("kakeya-4.625x", "two decimals"),
            ("kakeya-+4.6x", "two decimals"),
            ("kakeya-4.6x-uniform", "kakeya-4.6x-trellis"),
            ("", "no recipe"),
            ("{\"ratio\": 100}", "2.7..=9.0"),
            ("{\"bits\": 3}", "unknown field"),
            ("{\"base\": \"kakeya\"}", "valid:"),
            ("{\"min_slots\": 9}", "above 8"),
            ("{", "EOF"),
        ] {
            let e = Recipe::parse(text).unwrap_err().to_string();
            assert!(e.contains(part), "{text}: {e}");
        }
        // Refused by its length, not quoted back.
        let e = Recipe::parse(&"k".repeat(1 << 24)).unwrap_err().to_string();
        assert!(e.contains("16777216 bytes") && e.len() < 100, "{e}");
        assert_eq!(Recipe::parse("{\"quantizer\":\"trellis\"}").unwrap().quantizer, Quantizer::Trellis);
    }
}
