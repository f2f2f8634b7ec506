//! How many bits each unit of a head gets.
//!
//! The error of channel i costs lambda_i = var(x_i) * E[q_i^2] (for V: its variance), as seen by attention. Channels
//! are sorted by it, units take the geometric mean of theirs, and bits go one by one to the unit where one more lowers
//! the predicted error most, until the head's budget is spent. Then the lists are drawn from a small menu, because a
//! kernel wants every list at compile time.

use crate::grid::MAX_WIDTH;

/// Widths of a head's units: K's, then V's.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Widths {
    pub k: Vec<u8>,
    pub v: Vec<u8>,
}

/// Per head: the weight of each unit (K's times the recipe's weight, then V's) and the bits to spend.
pub struct Head {
    pub weight: Vec<f64>,
    pub bits: usize,
}

fn predicted(weight: &[f64], widths: &Widths, mse: &[f64; 7]) -> f64 {
    weight.iter().zip(widths.k.iter().chain(&widths.v)).map(|(w, &b)| w * mse[usize::from(b)]).sum()
}

/// Greedy allocation of exactly `head.bits` (or all units at 6).
fn allocate(head: &Head, mse: &[f64; 7]) -> Widths {
    let mut bits = vec![0usize; head.weight.len()];
    for _ in 0..head.bits {
        // First of the best: deterministic for equal weights.
        let mut best: Option<(usize, f64)> = None;
        for (i, w) in head.weight.iter().enumerate() {
            if bits[i] < MAX_WIDTH {
                let gain = w * (mse[bits[i]] - mse[bits[i] + 1]);
                if best.is_none_or(|(_, g)| gain > g) {
                    best = Some((i, gain));
                }
            }
        }
        let Some((i, _)) = best else { break };
        bits[i] += 1;
    }
    let (k, v) = bits.split_at(bits.len() / 2);
    Widths { k: k.iter().map(|&b| b as u8).collect(), v: v.iter().map(|&b| b as u8).collect() }
}

/// Widths of all heads, from at most `menu` different lists (more only where budgets differ more often than that). Where a
/// stream's weights never rise from unit to unit, neither do its widths: a GPU kernel relies on it.
///
/// Time grows with heads x lists, not with its square, because a calibration file decides how many lists there are: for the
/// most heads that a model may have, 3 s at 4 units a stream (65,536 heads, 1,740 lists) and 21 s at 8 (16,384 heads, 13,504 lists).
pub fn assign(heads: &[Head], mse: &[f64; 7], menu: usize) -> Vec<Widths> {
    let own: Vec<Widths> = heads.iter().map(|h| allocate(h, mse)).collect();
    let mut lists: Vec<Widths> = own.clone();
    lists.sort();
    lists.dedup();
    let mut kept = vec![true; lists.len()];
    let mut chosen: Vec<usize> =
        own.iter().map(|w| lists.binary_search(w).expect("lists are those of the heads")).collect();
    if lists.len() > menu {
        let sum = |w: &Widths| w.k.iter().chain(&w.v).map(|&b| usize::from(b)).sum::<usize>();
        let sums: Vec<usize> = lists.iter().map(sum).collect();
        // What a head would take instead of its list: of the same total, the first of the best. Infinite where there is none.
        let instead = |head: &Head, own: usize, kept: &[bool]| -> (usize, f64) {
            let mut best = (own, f64::INFINITY);
            for i in (0..lists.len()).filter(|&i| kept[i] && i != own && sums[i] == sums[own]) {
                let cost = predicted(&head.weight, &lists[i], mse);
                if cost < best.1 {
                    best = (i, cost);
                }
            }
            best
        };
        let mut second: Vec<(usize, f64)> =
            heads.iter().zip(&chosen).map(|(h, &own)| instead(h, own, &kept)).collect();
        for _ in menu..lists.len() {
            // Drop the list that costs least: its heads move to their best remaining list of the same total.
            let mut costs = vec![0.0; lists.len()];
            for ((head, &own), other) in heads.iter().zip(&chosen).zip(&second) {
                costs[own] += other.1 - predicted(&head.weight, &lists[own], mse);
            }
            let mut best: Option<(usize, f64)> = None;
            for (drop, &cost) in costs.iter().enumerate().filter(|(i, _)| kept[*i]) {
                if cost.is_finite() && best.is_none_or(|(_, c)| cost < c) {
                    best = Some((drop, cost));
                }
            }
            let Some((drop, _)) = best else { break };
            kept[drop] = false;
            for ((head, own), other) in heads.iter().zip(&mut chosen).zip(&mut second) {
                if *own == drop {
                    // Its cost was finite, so there is another.
                    *own = other.0;
                } else if other.0 != drop {
                    continue;
                }
                *other = instead(head, *own, &kept);
            }
        }
    }
    chosen.into_iter().map(|list| lists[list].clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grid::distortion;
    use crate::recipe::Quantizer;

    #[test]
    fn budget_is_spent_and_menu_kept() {
        let mse = distortion(Quantizer::Trellis);
        let heads: Vec<Head> = (0..60)
            .map(|h| Head {
                weight: (0..8).map(|u| ((h * 7 + u * 13) % 29) as f64 + 0.1).collect(),
                bits: if h % 5 == 0 { 25 } else { 26 },
            })
            .collect();
        for menu in [1000, 16, 3, 2] {
            let w = assign(&heads, mse, menu);
            for (h, w) in heads.iter().zip(&w) {
                assert_eq!(w.k.iter().chain(&w.v).map(|&b| usize::from(b)).sum::<usize>(), h.bits);
            }
            let mut d = w.clone();
            d.sort();
            d.dedup();
            assert!(d.len() <= menu, "{menu}: {}", d.len());
        }
    }

    #[test]
    fn falling_weights_get_falling_widths() {
        let mse = distortion(Quantizer::Trellis);
        let heads: Vec<Head> = (0..40)
            .map(|h| {
                let stream =
                    |n: i32| (0..4).map(move |u| 0.3f64.powi(u * (1 + (h + n) % 5)) * f64::from(1 + h % 7));
                Head { weight: stream(0).chain(stream(1)).collect(), bits: 8 + (h as usize % 3) * 9 }
            })
            .collect();
        for menu in [1000, 5, 3] {
            for w in assign(&heads, mse, menu) {
                assert!(w.k.is_sorted_by(|a, b| a >= b) && w.v.is_sorted_by(|a, b| a >= b), "{w:?}");
            }
        }
    }

    /// The same lists as the search that computes every cost anew in every round, which takes heads x lists^2.
    fn from_scratch(heads: &[Head], mse: &[f64; 7], menu: usize) -> Vec<Widths> {
        let mut chosen: Vec<Widths> = heads.iter().map(|h| allocate(h, mse)).collect();
        let sum = |w: &Widths| w.k.iter().chain(&w.v).map(|&b| usize::from(b)).sum::<usize>();
        let mut lists: Vec<Widths> = chosen.clone();
        lists.sort();
        lists.dedup();
        while lists.len() > menu {
            // Drop the list that costs least: its heads move to their best remaining list of the same total.
            let mut best: Option<(usize, f64)> = None;
            for (drop, list) in lists.iter().enumerate() {
                let mut cost = 0.0;
                for (head, _) in heads.iter().zip(&chosen).filter(|(_, c)| *c == list) {
                    let other = lists
                        .iter()
                        .filter(|l| *l != list && sum(l) == sum(list))
                        .map(|l| predicted(&head.weight, l, mse))
                        .fold(f64::INFINITY, f64::min);
                    cost += other - predicted(&head.weight, list, mse);
                }
                if cost.is_finite() && best.is_none_or(|(_, c)| cost < c) {
                    best = Some((drop, cost));
                }
            }
            let Some((drop, _)) = best else { break };
            let list = lists.remove(drop);
            for (head, c) in heads.iter().zip(&mut chosen).filter(|(_, c)| **c == list) {
                let other = lists.iter().filter(|l| sum(l) == sum(&list)).min_by(|a, b| {
                    predicted(&head.weight, a, mse).total_cmp(&predicted(&head.weight, b, mse))
                });
                *c = other.expect("a list of the same total remains, else the cost was infinite").clone();
            }
        }
        chosen
    }

    #[test]
    fn costs_that_are_kept_choose_as_costs_that_are_computed_anew() {
        let mse = distortion(Quantizer::Uniform);
        let mut seed = 1u64;
        let mut random = || {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) as f64 / (1u64 << 31) as f64
        };
        for round in 0..12 {
            let heads: Vec<Head> = (0..120)
                .map(|_| {
                    let mut stream = || {
                        let mut w: Vec<f64> = (0..4).map(|_| (6.0 * random() - 3.0).exp()).collect();
                        w.sort_by(|a, b| b.total_cmp(a));
                        w
                    };
                    let weight = [stream(), stream()].concat();
                    Head { weight, bits: 24 + (random() * 1.5) as usize }
                })
                .collect();
            for menu in [1, 2, 16, 60] {
                assert!(assign(&heads, mse, menu) == from_scratch(&heads, mse, menu), "{round} {menu}");
            }
        }
    }

    #[test]
    fn equal_weights_differ_by_one_bit_at_most() {
        let w = assign(&[Head { weight: vec![1.0; 8], bits: 26 }], distortion(Quantizer::LloydMax), 1);
        let all: Vec<u8> = w[0].k.iter().chain(&w[0].v).copied().collect();
        assert!(all.iter().max().unwrap() - all.iter().min().unwrap() <= 1);
    }
}
