//! How a steering program draws one of those it names.

use crate::kernel::Program;
use crate::rng::Rng;
use reuseportd_core::{ListenerId, Policy, Range, Share};
use std::collections::BTreeMap;

/// Weighted choice of a range, a place in it, by chance or the processor's, then onwards over holes; the other ranges if the
/// whole range is empty.
pub(crate) fn by_key(
    ranges: &[Range],
    keys: &BTreeMap<u32, ListenerId>,
    cpu: u64,
    rng: &mut Rng,
) -> Option<ListenerId> {
    let first = weighted(ranges.iter().map(|r| r.weight), rng);
    let (start, wheel) = (rng.next(), ranges.len());
    (0..wheel).map(|turn| &ranges[(first + turn) % wheel]).find_map(|range| {
        let (count, step) = (u64::from(range.count), u64::from(range.step));
        let start = if step > 0 { cpu * step } else { start };
        (0..count).find_map(|step| {
            let offset = u32::try_from((start % count + step) % count).unwrap_or(0);
            keys.get(&(range.base + offset)).copied()
        })
    })
}

/// A number out of range names nobody.
pub(crate) fn by_slot(shares: &[Share], slots: &[ListenerId], cpu: u64, rng: &mut Rng) -> Option<ListenerId> {
    let share = shares.get(weighted(shares.iter().map(|s| s.weight), rng))?;
    let by_chance = rng.index(share.slots.len());
    let of_cpu = usize::try_from(cpu).ok()? % share.slots.len().max(1);
    let slot = share.slots.get(if share.policy == Policy::Cpu { of_cpu } else { by_chance })?;
    slots.get(usize::from(*slot)).copied()
}

/// Whether such a number is among them.
pub(crate) fn names_a_hole(program: &Program, slots: &[ListenerId]) -> bool {
    let Program::Slots(shares) = program else { return false };
    shares.iter().flat_map(|share| &share.slots).any(|slot| usize::from(*slot) >= slots.len())
}

fn weighted(weights: impl Iterator<Item = u16> + Clone, rng: &mut Rng) -> usize {
    let mut left = rng.below(weights.clone().map(u64::from).sum());
    for (index, weight) in weights.enumerate() {
        if left < u64::from(weight) {
            return index;
        }
        left -= u64::from(weight);
    }
    0
}
