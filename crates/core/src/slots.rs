//! The places of listeners in a group, under either engine's rules.

use crate::event::Member;
use crate::id::{Generation, ListenerId};
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

/// The slots of a group under `cbpf`: a new listener takes the last one, and when one leaves, the last moves into
/// its place. The kernel does not tell the slots, only who listens since when; so what happened in between is followed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Slots(Vec<Member>);

impl Slots {
    /// As a former master knew them; a cookie that is there twice, which no master writes, counts where it is first. Whose
    /// they are shows in the next look.
    pub(crate) fn of_cookies(cookies: &[u64]) -> Slots {
        let is_first = |slot: usize| !cookies[..slot].contains(&cookies[slot]);
        let slots = (0..cookies.len()).filter(|slot| is_first(*slot));
        Slots(slots.map(|slot| Member { cookie: cookies[slot], listener: None }).collect())
    }

    /// The sockets, slot by slot.
    pub(crate) fn cookies(&self) -> Vec<u64> {
        self.0.iter().map(|member| member.cookie).collect()
    }

    /// Follows what happened since the last look. `false` if that can't be known for sure: several sockets left, or
    /// some left and some came, and in which order decides who sits where.
    pub(crate) fn sync(&mut self, members: &[Member]) -> bool {
        let is_there = |member: &Member| members.iter().any(|other| other.cookie == member.cookie);
        let stayed = self.0.iter().filter(|member| is_there(member)).count();
        let left_from_the_end = self.0.iter().take(stayed).all(is_there);
        let somebody_came = members.len() > stayed;
        let left = self.0.len() - stayed;
        let is_sure = left == 0 || (!somebody_came && (left_from_the_end || left == 1));
        for slot in (0..self.0.len()).rev() {
            if !is_there(&self.0[slot]) {
                self.0.swap_remove(slot);
            }
        }
        for member in members {
            match self.0.iter_mut().find(|known| known.cookie == member.cookie) {
                Some(known) => known.listener = member.listener,
                None => self.0.push(*member),
            }
        }
        is_sure
    }

    /// Every socket that was in a slot is there still.
    pub(crate) fn is_longer(&self, before: &Slots) -> bool {
        self.cookies().starts_with(&before.cookies())
    }

    /// The socket of a listener.
    pub(crate) fn cookie_of(&self, listener: ListenerId) -> Option<u64> {
        self.0.iter().find(|member| member.listener == Some(listener)).map(|member| member.cookie)
    }

    /// Of all that happened since the last look this came first: the socket left, or did not.
    pub(crate) fn note_left(&mut self, cookie: u64, members: &[Member]) {
        let is_it = |member: &Member| member.cookie == cookie;
        if let Some(slot) = self.0.iter().position(is_it).filter(|_| !members.iter().any(is_it)) {
            self.0.swap_remove(slot);
        }
    }

    /// The slots as they are if of those that left this socket was the last.
    pub(crate) fn also_without(mut self, cookie: u64, members: &[Member]) -> Slots {
        let stayed = |member: &&Member| {
            member.cookie == cookie || members.iter().any(|other| other.cookie == member.cookie)
        };
        let without_others: Vec<Member> = self.0.iter().filter(stayed).copied().collect();
        self.sync(&without_others);
        self.note_left(cookie, members);
        self
    }

    /// The slot of a listener.
    pub(crate) fn of(&self, listener: ListenerId) -> Option<u16> {
        let slot = self.0.iter().position(|member| member.listener == Some(listener))?;
        u16::try_from(slot).ok()
    }

    /// The listener that will move when this one leaves, unless it is itself the last.
    pub(crate) fn mover(&self, leaving: ListenerId) -> Option<ListenerId> {
        let last = self.0.last()?.listener?;
        (last != leaving && self.of(leaving).is_some()).then_some(last)
    }

    /// It is the only one left in the group.
    pub(crate) fn is_last(&self, listener: ListenerId) -> bool {
        self.0.len() == 1 && self.of(listener).is_some()
    }

    /// No socket sits in two slots.
    pub(crate) fn is_consistent(&self) -> bool {
        self.0
            .iter()
            .enumerate()
            .all(|(slot, member)| !self.0[slot + 1..].iter().any(|m| m.cookie == member.cookie))
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
/// The few above them are the shell's, for proving workers.
pub(crate) const KEYS_MAX: u32 = 8190;
/// The steering program looks through no more than this for one connection.
const RANGE_KEYS_MAX: u32 = 1024;
/// The last of them belong to seats, whichever generation uses them: a socket that two generations share stays under its
/// key, and the switch is one write for it too.
const SEAT_KEYS: u32 = KEYS_MAX - 1024;

impl Keys {
    /// The range of a generation.
    pub(crate) fn of(&self, generation: Generation) -> Option<KeyRange> {
        self.0.iter().find(|range| range.generation == generation).copied()
    }

    /// The keys of the sockets of so many seats; `None` if there are not so many.
    pub(crate) fn of_seats(generation: Generation, count: u32) -> Option<KeyRange> {
        let range = KeyRange { generation, base: SEAT_KEYS, stride: 1, count };
        (count <= KEYS_MAX - SEAT_KEYS).then_some(range)
    }

    /// Gives a generation the lowest free range with room for at least so many seats; `None` if there is no room.
    pub(crate) fn give(&mut self, generation: Generation, seats: u32, stride: u32) -> Option<KeyRange> {
        // Room for as many as a range may have, so that seats can be added; less where there is no such room.
        let needed = seats.checked_mul(stride)?;
        let mut count = RANGE_KEYS_MAX.max(needed);
        loop {
            match self.give_range(generation, count, stride) {
                None if count > needed => count = (count / 2).max(needed),
                range => return range,
            }
        }
    }

    fn give_range(&mut self, generation: Generation, count: u32, stride: u32) -> Option<KeyRange> {
        let mut base = 0;
        let mut at = 0;
        while let Some(taken) = self.0.get(at) {
            if base + count <= taken.base {
                break;
            }
            base = taken.base + taken.count;
            at += 1;
        }
        if base + count > SEAT_KEYS {
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

    fn members(cookies: &[u64]) -> Vec<Member> {
        let listener = |cookie: u64| u32::try_from(cookie).ok().filter(|n| *n < 100).map(ListenerId);
        cookies.iter().map(|cookie| Member { cookie: *cookie, listener: listener(*cookie) }).collect()
    }

    #[test]
    fn the_last_slot_moves_into_the_hole() {
        let mut slots = Slots::default();
        assert!(slots.sync(&members(&[1, 2, 3, 4])));
        assert_eq!(slots.mover(ListenerId(1)), Some(ListenerId(4)));
        slots.remove(ListenerId(1));
        assert_eq!(slots.of(ListenerId(4)), Some(0));
        assert!(slots.sync(&members(&[2, 3, 4, 5])), "the kernel lists by age, and 5 took the last slot");
        assert_eq!([4, 2, 3, 5].map(|n| slots.of(ListenerId(n))), [Some(0), Some(1), Some(2), Some(3)]);
        assert!(slots.sync(&members(&[2, 3, 4, 5, 900])));
        assert_eq!(slots.mover(ListenerId(4)), None, "a stranger moves, and nobody steers to it");
    }

    #[test]
    fn which_of_two_left_first_shows_only_where_it_makes_no_difference() {
        let mut slots = Slots::default();
        slots.sync(&members(&[1, 2, 3, 4, 5]));
        let (before, left) = (slots.clone(), members(&[1, 4, 5]));
        slots.remove(ListenerId(3));
        assert!(slots.sync(&left));
        assert_eq!(slots.cookies(), [1, 4, 5]);
        assert_eq!(before.clone().also_without(3, &left).cookies(), [1, 5, 4]);
        let alone = members(&[1, 2, 4, 5]);
        slots = before.clone();
        slots.remove(ListenerId(3));
        assert!(slots.sync(&alone) && slots == before.also_without(3, &alone));
    }

    #[test]
    fn one_that_left_unseen_is_followed_and_several_are_not_sure() {
        let mut slots = Slots::default();
        slots.sync(&members(&[1, 2, 3, 4, 5]));
        assert!(slots.sync(&members(&[1, 2, 3])), "the last ones move nobody");
        assert!(slots.sync(&members(&[2, 3])), "one moves the last");
        assert_eq!(slots.of(ListenerId(3)), Some(0));
        slots.sync(&members(&[2, 3, 6, 7]));
        assert!(!slots.sync(&members(&[6, 7])));
    }

    #[test]
    fn a_damaged_journal_puts_nobody_into_two_slots() {
        let slots = Slots::of_cookies(&[7, 8, 7, 9, 8]);
        assert_eq!(slots.cookies(), [7, 8, 9]);
        assert!(slots.is_consistent());
    }

    #[test]
    fn keys_are_disjoint_and_come_back() {
        let mut keys = Keys::default();
        let first = keys.give(Generation(1), 4, 2).unwrap();
        let second = keys.give(Generation(2), 2000, 1).unwrap();
        assert_eq!((first.base, second.base, second.count), (0, 1024, 2000));
        keys.take_back(Generation(1));
        assert_eq!(keys.give(Generation(3), 1025, 1).unwrap().base, 3024, "too large for the hole");
        assert_eq!(keys.give(Generation(4), 8, 1).unwrap().base, 0);
        assert!(keys.give(Generation(5), KEYS_MAX, 1).is_none());
        let mut last = 1024;
        while let Some(range) = keys.give(Generation(9), 10, 1) {
            assert!(range.count <= last && range.count >= 10, "less where there is less room: {range:?}");
            last = range.count;
        }
        assert!(last < 1024, "room is never left unused");
    }
}
