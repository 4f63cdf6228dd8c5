//! Datagrams in the simulated kernel: sockets are in their group from `bind()` on, flows are remembered, nothing migrates.

use crate::draw::{by_key, by_slot};
use crate::kernel::{Choice, Kernel, Program};
use crate::rng::Rng;
use reuseportd_core::{Generation, GroupId, ListenerId};
use std::collections::BTreeMap;
use std::time::Duration;

/// What one takes up in a receive queue.
pub(crate) const BYTES: usize = 768;

/// One that nobody will read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dropped {
    pub(crate) datagram: u64,
    pub(crate) listener: ListenerId,
    /// The master read it, to count it.
    pub(crate) counted: bool,
}

#[derive(Clone, Copy, Debug)]
struct Flow {
    key: u32,
    generation: Generation,
    last: u64,
}

/// `ebpf`: what the program remembers of flows in a group.
#[derive(Debug, Default)]
pub(crate) struct Flows {
    /// For so long; `None`: nothing.
    pub(crate) timeout: Option<u64>,
    table: BTreeMap<u64, Flow>,
    /// Whose each key is, and when a flow's datagram last went there.
    owners: BTreeMap<u32, (Generation, Option<u64>)>,
}

impl Flows {
    /// The key of this flow, if it is still that of the generation it began with.
    fn known(&self, source: u64, now: u64) -> Option<u32> {
        let flow = self.table.get(&source)?;
        let is_its = self.owners.get(&flow.key).is_some_and(|(owner, _)| *owner == flow.generation);
        (is_its && now - flow.last < self.timeout?).then_some(flow.key)
    }

    fn note(&mut self, source: u64, key: u32, now: u64) {
        if let Some((generation, last)) = self.owners.get_mut(&key).filter(|_| self.timeout.is_some()) {
            *last = Some(now);
            self.table.insert(source, Flow { key, generation: *generation, last: now });
        }
    }

    /// How long nothing of a flow has come to a key.
    pub(crate) fn quiet(&self, key: u32, now: u64) -> Duration {
        let last = self.owners.get(&key).and_then(|(_, last)| *last);
        last.map_or(Duration::MAX, |last| Duration::from_nanos(now - last))
    }
}

impl Kernel {
    pub(crate) fn takes_datagrams(&self, group: GroupId) -> bool {
        self.datagram_groups.contains(&group)
    }

    /// A datagram of some flow, on some processor.
    pub(crate) fn datagram(&mut self, group: GroupId, source: u64, now: u64, rng: &mut Rng) -> (u64, Choice) {
        let choice = self.choose_for(group, source, now, rng);
        (self.arrive(choice), choice)
    }

    fn choose_for(&mut self, id: GroupId, source: u64, now: u64, rng: &mut Rng) -> Choice {
        let cpu = rng.below(8);
        let Some(group) = self.groups.get_mut(&id).filter(|group| !group.slots.is_empty()) else {
            return Choice::Refused;
        };
        // The same for all of a flow.
        let mut hash = Rng::new(source);
        let named = match &group.program {
            Program::Hash => None,
            Program::Ranges(ranges) if ranges.is_empty() => return Choice::Refused,
            Program::Ranges(ranges) => {
                let known = group.flows.known(source, now);
                if let Some((key, listener)) = known.and_then(|key| Some((key, *group.keys.get(&key)?))) {
                    group.flows.note(source, key, now);
                    return Choice::Known(listener);
                }
                by_key(ranges, &group.keys, cpu, &mut hash)
            }
            Program::Slots(shares) => by_slot(shares, &group.slots, cpu, &mut hash),
        };
        let key = named.and_then(|listener| self.sockets.get(&listener)?.key);
        key.into_iter().for_each(|key| group.flows.note(source, key, now));
        named.map_or_else(|| Choice::Hashed(group.slots[hash.index(group.slots.len())]), Choice::Named)
    }

    /// A key is a generation's from now on.
    pub(crate) fn own(&mut self, group: GroupId, key: u32, generation: Generation) {
        let owner = self.group(group).flows.owners.entry(key).or_insert((generation, None));
        if owner.0 != generation {
            *owner = (generation, None);
        }
    }

    /// The master reads what waits there.
    pub(crate) fn discard(&mut self, listener: ListenerId) -> u32 {
        let Some(socket) = self.sockets.get_mut(&listener) else { return 0 };
        let waiting: Vec<u64> = socket.queue.drain(..).collect();
        self.drop_datagrams(listener, &waiting, true);
        u32::try_from(waiting.len()).unwrap_or(u32::MAX)
    }

    pub(crate) fn drop_datagrams(&mut self, listener: ListenerId, waiting: &[u64], counted: bool) {
        for datagram in waiting {
            self.waiting.remove(datagram);
            self.dropped.push(Dropped { datagram: *datagram, listener, counted });
        }
    }
}
