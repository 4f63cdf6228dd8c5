//! The places of listeners in a group, under either engine's rules.

use crate::id::{Generation, ListenerId};
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

/// The slots of a group under `cbpf`: a new listener takes the last one, and when one leaves, the last moves into
/// its place. `None` is a listener that is nobody's, or not known yet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Slots(Vec<Option<ListenerId>>);

impl Slots {
    /// Takes over what the kernel says; whether a listener sits elsewhere than the model said.
    pub(crate) fn sync(&mut self, order: &[Option<ListenerId>]) -> bool {
        let differs = self.0.iter().zip(order).any(|(model, kernel)| model.is_some() && model != kernel)
            || self.0.len() > order.len();
        self.0 = order.to_vec();
        differs
    }

    /// The slot of a listener.
    pub(crate) fn of(&self, listener: ListenerId) -> Option<u16> {
        self.0.iter().position(|slot| *slot == Some(listener)).and_then(|slot| u16::try_from(slot).ok())
    }

    /// The listener that will move when this one leaves, unless it is itself the last.
    pub(crate) fn mover(&self, leaving: ListenerId) -> Option<ListenerId> {
        let last = (*self.0.last()?)?;
        (last != leaving && self.of(leaving).is_some()).then_some(last)
    }

    /// No listener sits in two slots.
    pub(crate) fn is_consistent(&self) -> bool {
        self.0
            .iter()
            .enumerate()
            .all(|(slot, listener)| listener.is_none() || !self.0[slot + 1..].contains(listener))
    }

    /// A listener left: the last moves into the hole.
    pub(crate) fn remove(&mut self, listener: ListenerId) {
        if let Some(slot) = self.of(listener) {
            self.0.swap_remove(usize::from(slot));
        }
    }
}

/// Keys of a group's array under `ebpf`, given out as one range per generation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Keys(Vec<KeyRange>);

/// A generation's keys: `stride` for each seat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KeyRange {
    pub(crate) generation: Generation,
    pub(crate) base: u32,
    pub(crate) stride: u32,
    pub(crate) count: u32,
}

/// Keys in a group's array: enough for two generations of 1,024 workers with several listeners each.
pub(crate) const KEYS_MAX: u32 = 8192;

impl Keys {
    /// The range of a generation.
    pub(crate) fn of(&self, generation: Generation) -> Option<KeyRange> {
        self.0.iter().find(|range| range.generation == generation).copied()
    }

    /// Gives a generation the lowest free range; `None` if there is no room.
    pub(crate) fn give(&mut self, generation: Generation, seats: u32, stride: u32) -> Option<KeyRange> {
        let count = seats.checked_mul(stride)?;
        let mut base = 0;
        let mut at = 0;
        while let Some(taken) = self.0.get(at) {
            if base + count <= taken.base {
                break;
            }
            base = taken.base + taken.count;
            at += 1;
        }
        if base + count > KEYS_MAX {
            return None;
        }
        let range = KeyRange { generation, base, stride, count };
        self.0.insert(at, range);
        Some(range)
    }

    /// Takes a generation's range back.
    pub(crate) fn take_back(&mut self, generation: Generation) {
        self.0.retain(|range| range.generation != generation);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_slot_moves_into_the_hole() {
        let listener = |n| Some(ListenerId(n));
        let mut slots = Slots::default();
        assert!(!slots.sync(&[listener(1), listener(2), None, listener(4)]));
        assert_eq!(slots.mover(ListenerId(1)), listener(4));
        slots.remove(ListenerId(1));
        assert_eq!(slots.of(ListenerId(4)), Some(0));
        assert_eq!(slots.mover(ListenerId(4)), None, "a stranger moves, and nobody steers to it");
        assert!(slots.sync(&[listener(2), listener(4)]), "not where the model said");
    }

    #[test]
    fn keys_are_disjoint_and_come_back() {
        let mut keys = Keys::default();
        let first = keys.give(Generation(1), 4, 2).unwrap();
        let second = keys.give(Generation(2), 4, 1).unwrap();
        assert_eq!((first.base, second.base), (0, 8));
        keys.take_back(Generation(1));
        assert_eq!(keys.give(Generation(3), 9, 1).unwrap().base, 12, "too large for the hole");
        assert_eq!(keys.give(Generation(4), 8, 1).unwrap().base, 0);
        assert!(keys.give(Generation(5), KEYS_MAX, 1).is_none());
    }
}
