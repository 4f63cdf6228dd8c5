//! A kernel reduced to what steering depends on: reuseport groups, listeners, references, half-open handshakes, queues.
//!
//! Its rules are those measured on the real one; the kernel-facts test of the sys crate holds the real one to them.

use crate::datagrams::{BYTES, Dropped, Flows};
use crate::draw::{by_key, by_slot, names_a_hole};
use crate::rng::Rng;
use reuseportd_core::{
    Depth, Generation, GroupId, GroupView, ListenerId, Member, Range, Seat, Share, WorkerId,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

const EINVAL: i32 = 22;
const EBUSY: i32 = 16;

/// Whoever holds a descriptor of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Holder {
    Leader(WorkerId),
    Child(WorkerId),
    /// A sibling that was asked to take the leftovers.
    Taker(WorkerId),
    /// A message that carries the descriptor and has not been read.
    Flight,
    Master,
    Stranger,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    Bound,
    Listening,
    Gone,
}

#[derive(Debug)]
pub(crate) struct Socket {
    pub(crate) group: GroupId,
    /// `None` is a stranger, or a seat.
    pub(crate) owner: Option<WorkerId>,
    /// The master made it for this seat.
    pub(crate) seat: Option<Seat>,
    /// Who it was passed to, one after the other.
    pub(crate) users: Vec<WorkerId>,
    pub(crate) stage: Stage,
    pub(crate) holders: BTreeSet<Holder>,
    pub(crate) queue: VecDeque<u64>,
    pub(crate) half_open: BTreeSet<u64>,
    /// The master was told of it.
    pub(crate) known: bool,
    /// It was in its group when somebody looked.
    seen: bool,
    pub(crate) key: Option<u32>,
}

impl Socket {
    /// Some process of a worker holds it.
    pub(crate) fn is_owned(&self) -> bool {
        self.holders.iter().any(|holder| matches!(holder, Holder::Leader(_) | Holder::Child(_)))
    }

    /// Some process of this worker holds it.
    pub(crate) fn is_owned_by(&self, worker: WorkerId) -> bool {
        self.holders.contains(&Holder::Leader(worker)) || self.holders.contains(&Holder::Child(worker))
    }

    /// Who binds it, or was given it.
    pub(crate) fn workers(&self) -> impl Iterator<Item = WorkerId> {
        self.owner.into_iter().chain(self.users.iter().copied())
    }
}

/// The program in force in a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    Hash,
    Ranges(Vec<Range>),
    Slots(Vec<Share>),
}

#[derive(Debug)]
pub(crate) struct Group {
    /// Listeners in slot order, which nobody can ask for.
    pub(crate) slots: Vec<ListenerId>,
    /// The same by age, which is how the kernel lists them.
    by_age: Vec<ListenerId>,
    pub(crate) program: Program,
    pub(crate) keys: BTreeMap<u32, ListenerId>,
    pub(crate) flows: Flows,
    /// The array and its program belong to a master of which nothing is left.
    pub(crate) is_foreign: bool,
    /// Since its program was put in force, it has named a slot that was nobody's.
    pub(crate) had_hole: bool,
    migrated: u64,
}

impl Default for Group {
    fn default() -> Group {
        Group {
            slots: Vec::new(),
            by_age: Vec::new(),
            program: Program::Hash,
            keys: BTreeMap::new(),
            flows: Flows::default(),
            is_foreign: false,
            had_hole: false,
            migrated: 0,
        }
    }
}

/// What became of a SYN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// The program named this listener.
    Named(ListenerId),
    /// It remembered that the flow goes there.
    Known(ListenerId),
    /// The program named nobody who is there, so the kernel hashed over all.
    Hashed(ListenerId),
    /// No listener, or the program refuses.
    Refused,
}

/// A begun connection that was reset before anybody accepted it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Loss {
    pub(crate) connection: u64,
    pub(crate) listener: ListenerId,
    pub(crate) half_open: bool,
}

#[derive(Default)]
pub(crate) struct Kernel {
    pub(crate) groups: BTreeMap<GroupId, Group>,
    pub(crate) sockets: BTreeMap<ListenerId, Socket>,
    /// Where each connection waits that nobody has accepted.
    pub(crate) waiting: BTreeMap<u64, ListenerId>,
    /// `net.ipv4.tcp_migrate_req`.
    pub(crate) migrates_by_hash: bool,
    /// Groups whose sockets take datagrams.
    pub(crate) datagram_groups: BTreeSet<GroupId>,
    /// Since somebody last asked.
    pub(crate) losses: Vec<Loss>,
    /// Datagrams, since somebody last asked.
    pub(crate) dropped: Vec<Dropped>,
    /// Groups that a listener left otherwise than by the master's hand, since somebody last asked.
    pub(crate) left: BTreeSet<GroupId>,
    /// Groups that one came to and left unseen, which moved others; since somebody last asked.
    pub(crate) confused: BTreeSet<GroupId>,
    /// Listeners in which something new waits, since somebody last asked.
    pub(crate) woken: Vec<ListenerId>,
    /// The master is another's successor.
    pub(crate) is_adopted: bool,
    failures: u64,
    next_listener: u32,
    next_connection: u64,
}

impl Kernel {
    /// A new socket with an address, but without a slot, unless it takes datagrams.
    pub(crate) fn bind(&mut self, group: GroupId, owner: Option<WorkerId>, holder: Holder) -> ListenerId {
        self.next_listener += 1;
        let socket = Socket {
            group,
            owner,
            seat: None,
            users: Vec::new(),
            stage: Stage::Bound,
            holders: BTreeSet::from([holder]),
            queue: VecDeque::new(),
            half_open: BTreeSet::new(),
            known: false,
            seen: false,
            key: None,
        };
        let listener = ListenerId(self.next_listener);
        self.sockets.insert(listener, socket);
        if self.takes_datagrams(group) {
            let _ = self.listen(listener);
        }
        listener
    }

    /// Takes the last slot; listening again changes nothing.
    pub(crate) fn listen(&mut self, listener: ListenerId) -> Result<(), i32> {
        let socket = self.sockets.get_mut(&listener).ok_or(EINVAL)?;
        match socket.stage {
            Stage::Bound => {
                socket.stage = Stage::Listening;
                let group = self.groups.entry(socket.group).or_default();
                group.slots.push(listener);
                group.by_age.push(listener);
                Ok(())
            }
            Stage::Listening => Ok(()),
            Stage::Gone => Err(EINVAL),
        }
    }

    /// The group by its name; one without listeners is as good as none.
    pub(crate) fn group(&mut self, group: GroupId) -> &mut Group {
        self.groups.entry(group).or_default()
    }

    /// A client's first packet. A begun handshake belongs to its listener from here on.
    pub(crate) fn syn(&mut self, group: GroupId, rng: &mut Rng) -> (u64, Choice) {
        self.next_connection += 1;
        let choice = self.choose(group, rng, false);
        if let Choice::Named(listener) | Choice::Hashed(listener) = choice {
            self.place(self.next_connection, listener, true);
        }
        (self.next_connection, choice)
    }

    /// Something that waits from the first moment on.
    pub(crate) fn arrive(&mut self, choice: Choice) -> u64 {
        self.next_connection += 1;
        if let Choice::Named(listener) | Choice::Hashed(listener) | Choice::Known(listener) = choice {
            self.place(self.next_connection, listener, false);
        }
        self.next_connection
    }

    /// The last packet of the handshake arrived.
    pub(crate) fn finish(&mut self, connection: u64) {
        if let Some(listener) = self.waiting.get(&connection).copied()
            && let Some(socket) = self.sockets.get_mut(&listener)
            && socket.half_open.remove(&connection)
        {
            socket.queue.push_back(connection);
            self.woken.push(listener);
        }
    }

    pub(crate) fn accept(&mut self, listener: ListenerId) -> Option<u64> {
        let connection = self.sockets.get_mut(&listener)?.queue.pop_front()?;
        self.waiting.remove(&connection);
        Some(connection)
    }

    /// One holder closes its descriptor; with the last one the listener leaves its group.
    pub(crate) fn close(&mut self, listener: ListenerId, holder: Holder, rng: &mut Rng) {
        let Some(socket) = self.sockets.get_mut(&listener) else { return };
        let held = socket.holders.remove(&holder);
        if held && socket.holders.is_empty() {
            self.leave(listener, holder == Holder::Master, rng);
        }
    }

    /// The same, but nobody decided it.
    pub(crate) fn lose(&mut self, listener: ListenerId, holder: Holder, rng: &mut Rng) {
        let Some(socket) = self.sockets.get_mut(&listener) else { return };
        if socket.holders.remove(&holder) && socket.holders.is_empty() {
            self.leave(listener, false, rng);
        }
    }

    /// The listener leaves its group, whoever still holds it; with datagrams there is no such thing.
    pub(crate) fn shutdown(&mut self, listener: ListenerId, rng: &mut Rng) {
        if !self.takes_datagrams(self.sockets[&listener].group) {
            self.leave(listener, true, rng);
        }
    }

    /// A process ended: all its descriptors are closed.
    pub(crate) fn forget(&mut self, holder: Holder, rng: &mut Rng) {
        let held: Vec<ListenerId> =
            self.sockets.iter().filter(|(_, s)| s.holders.contains(&holder)).map(|(id, _)| *id).collect();
        for listener in held {
            self.close(listener, holder, rng);
        }
    }

    /// `ebpf`: a socket has one key at most, and must listen; who was under the key before is there no more.
    pub(crate) fn admit(&mut self, listener: ListenerId, key: u32) -> Result<(), i32> {
        let group = self.sockets.get(&listener).ok_or(EINVAL)?.group;
        self.make_array(group);
        let socket = self.sockets.get_mut(&listener).ok_or(EINVAL)?;
        if socket.stage != Stage::Listening {
            return Err(EINVAL);
        }
        let keys = &mut self.groups.entry(socket.group).or_default().keys;
        // It is moved; the shell takes out what is under another key.
        match socket.key {
            Some(before) if before == key => return Ok(()),
            Some(before) if self.is_adopted => {
                keys.remove(&before);
            }
            Some(_) => return Err(EBUSY),
            None => {}
        }
        socket.key = Some(key);
        let before = keys.insert(key, listener);
        if let Some(socket) = before.and_then(|before| self.sockets.get_mut(&before)) {
            socket.key = None;
        }
        Ok(())
    }

    /// The first thing put into an array makes it, and attaches its program, which names nobody yet.
    pub(crate) fn make_array(&mut self, group: GroupId) {
        if std::mem::take(&mut self.group(group).is_foreign) {
            self.keep_keys(group, &[]);
            self.group(group).program = Program::Hash;
            self.group(group).flows = Flows::default();
        }
    }

    pub(crate) fn put_in_force(&mut self, group: GroupId, program: Program) {
        self.make_array(group);
        let group = self.group(group);
        group.had_hole = names_a_hole(&program, &group.slots);
        group.program = program;
    }

    /// Empties every key but these.
    pub(crate) fn keep_keys(&mut self, group: GroupId, kept: &[u32]) {
        let keys: Vec<u32> = self.group(group).keys.keys().copied().collect();
        for key in keys.into_iter().filter(|key| !kept.contains(key)) {
            self.evict(group, key);
        }
    }

    pub(crate) fn evict(&mut self, group: GroupId, key: u32) {
        if let Some(listener) = self.group(group).keys.remove(&key)
            && let Some(socket) = self.sockets.get_mut(&listener)
        {
            socket.key = None;
        }
    }

    /// The listeners a program names, in no particular order.
    pub(crate) fn named(&self, group: GroupId) -> BTreeSet<ListenerId> {
        let Some(group) = self.groups.get(&group) else { return BTreeSet::new() };
        match &group.program {
            Program::Hash => BTreeSet::new(),
            Program::Ranges(ranges) => {
                let within = |key: u32| ranges.iter().any(|r| (r.base..r.base + r.count).contains(&key));
                group.keys.iter().filter(|(key, _)| within(**key)).map(|(_, id)| *id).collect()
            }
            Program::Slots(shares) => {
                let slots = shares.iter().flat_map(|s| s.slots.iter());
                slots.filter_map(|slot| group.slots.get(usize::from(*slot)).copied()).collect()
            }
        }
    }

    /// The same by the parts of the new connections they get, and whose the program says each is.
    pub(crate) fn parts(&self, group: GroupId) -> Vec<(Option<Generation>, BTreeSet<ListenerId>)> {
        let Some(group) = self.groups.get(&group) else { return Vec::new() };
        match &group.program {
            Program::Hash => Vec::new(),
            Program::Ranges(ranges) => {
                let of = |r: &Range| group.keys.range(r.base..r.base + r.count).map(|(_, id)| *id).collect();
                ranges.iter().map(|range| (Some(range.generation), of(range))).collect()
            }
            Program::Slots(shares) => {
                let at = |slot: &u16| group.slots.get(usize::from(*slot)).copied();
                shares.iter().map(|s| (None, s.slots.iter().filter_map(at).collect())).collect()
            }
        }
    }

    pub(crate) fn note_seen(&mut self, group: GroupId) {
        for listener in self.groups.get(&group).into_iter().flat_map(|group| &group.slots) {
            self.sockets.get_mut(listener).into_iter().for_each(|socket| socket.seen = true);
        }
    }

    /// What sock_diag and the program's counters show.
    pub(crate) fn observe(&self, group: GroupId, now: u64) -> GroupView {
        let empty = Group::default();
        let seen = self.groups.get(&group).unwrap_or(&empty);
        let known = |id: &ListenerId| self.sockets[id].known.then_some(*id);
        let takes_datagrams = self.takes_datagrams(group);
        let each = if takes_datagrams { BYTES } else { 1 };
        let depth = |id: ListenerId| Depth {
            queued: u32::try_from(self.sockets[&id].queue.len() * each).unwrap_or(u32::MAX),
            backlog: 4096,
            drops: None,
            quiet: self.sockets[&id].key.filter(|_| takes_datagrams).map(|key| seen.flows.quiet(key, now)),
        };
        GroupView {
            members: seen
                .by_age
                .iter()
                .map(|id| Member { cookie: u64::from(id.0), listener: known(id) })
                .collect(),
            depths: seen.by_age.iter().filter_map(known).map(|id| (id, depth(id))).collect(),
            half_open: seen.slots.iter().flat_map(|id| self.sockets[id].half_open.iter().copied()).collect(),
            migrated: matches!(seen.program, Program::Ranges(_)).then_some(seen.migrated),
            migrate_failures: Some(self.failures),
            migrates_by_hash: self.migrates_by_hash,
        }
    }

    fn choose(&self, group: GroupId, rng: &mut Rng, migrating: bool) -> Choice {
        let Some(group) = self.groups.get(&group) else { return Choice::Refused };
        if group.slots.is_empty() {
            return Choice::Refused;
        }
        let named = match &group.program {
            Program::Hash => None,
            Program::Ranges(ranges) if ranges.is_empty() && !migrating => return Choice::Refused,
            Program::Ranges(ranges) => by_key(ranges, &group.keys, rng.below(8), rng),
            Program::Slots(shares) => by_slot(shares, &group.slots, rng.below(8), rng),
        };
        named.map_or_else(|| Choice::Hashed(group.slots[rng.index(group.slots.len())]), Choice::Named)
    }

    fn place(&mut self, connection: u64, listener: ListenerId, half_open: bool) {
        if let Some(socket) = self.sockets.get_mut(&listener) {
            self.waiting.insert(connection, listener);
            if half_open {
                socket.half_open.insert(connection);
            } else {
                socket.queue.push_back(connection);
                self.woken.push(listener);
            }
        }
    }

    /// Swap-remove, then the fate of what waited: migrated where the kernel does so, else reset.
    fn leave(&mut self, listener: ListenerId, by_master: bool, rng: &mut Rng) {
        let Some(socket) = self.sockets.get_mut(&listener) else { return };
        let listened = socket.stage == Stage::Listening;
        socket.stage = Stage::Gone;
        let (id, key, seen) = (socket.group, socket.key.take(), socket.seen);
        let half_open = std::mem::take(&mut socket.half_open).into_iter().map(|c| (c, true));
        let mut orphans: Vec<(u64, bool)> =
            half_open.chain(socket.queue.drain(..).map(|c| (c, false))).collect();
        if self.datagram_groups.contains(&id) {
            let waiting: Vec<u64> = std::mem::take(&mut orphans).into_iter().map(|(id, _)| id).collect();
            self.drop_datagrams(listener, &waiting, false);
        }
        let group = self.groups.entry(id).or_default();
        if let Some(key) = key {
            group.keys.remove(&key);
        }
        if listened {
            if !seen && group.slots.last() != Some(&listener) {
                self.confused.insert(id);
            }
            group.slots.retain_swap(listener);
            group.by_age.retain(|other| *other != listener);
            group.had_hole |= names_a_hole(&group.program, &group.slots);
            if !by_master {
                self.left.insert(id);
            }
        }
        let migrates = self.migrates_by_hash || matches!(group.program, Program::Ranges(_));
        for (connection, half_open) in orphans {
            self.migrate(id, connection, listener, half_open, migrates, rng);
        }
        let group = self.groups.entry(id).or_default();
        if group.slots.is_empty() {
            group.program = Program::Hash;
        }
    }

    fn migrate(
        &mut self,
        group: GroupId,
        connection: u64,
        from: ListenerId,
        half_open: bool,
        migrates: bool,
        rng: &mut Rng,
    ) {
        self.waiting.remove(&connection);
        let choice = if migrates { self.choose(group, rng, true) } else { Choice::Refused };
        match choice {
            Choice::Named(listener) | Choice::Known(listener) | Choice::Hashed(listener) => {
                self.group(group).migrated += 1;
                self.place(connection, listener, half_open);
            }
            Choice::Refused => {
                self.failures += u64::from(migrates);
                self.losses.push(Loss { connection, listener: from, half_open });
            }
        }
    }
}

trait RetainSwap {
    /// The last one moves into the hole, as in the kernel.
    fn retain_swap(&mut self, gone: ListenerId);
}

impl RetainSwap for Vec<ListenerId> {
    fn retain_swap(&mut self, gone: ListenerId) {
        if let Some(hole) = self.iter().position(|id| *id == gone) {
            self.swap_remove(hole);
        }
    }
}
