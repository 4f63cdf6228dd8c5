//! The groups in the kernel: carrying out what the core decided about steering.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use reuseportd_core::{Engine, Generation, GroupId, Policy, Range, Share};
use reuseportd_sys::bpf::{
    self, BpfError, COUNTER_SLOTS, EbpfGroup, FlowCounters, Flows, PLAN_RECORDS, Plan, Probe,
};
use reuseportd_sys::capability;
use reuseportd_sys::cbpf::{self, Pick};

use reuseportd_wire::status::{self as wire, Protocol};
use rustix::event::{Timespec, poll};
use serde::{Deserialize, Serialize};

use super::carried::Carried;
use super::clock;
use crate::config::{Bind, Endpoint, EngineChoice, Listen, default_protocol};

/// The engine in force, and why it is this one.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Choice {
    pub(crate) engine: Engine,
    pub(crate) reason: String,
}

/// Why the wanted engine can't be had.
#[derive(Debug, thiserror::Error)]
#[error("steering.engine = \"ebpf\" can't be used here: {0}; give the master CAP_BPF, or set \"auto\"")]
pub(crate) struct EngineError(String);

/// The engine, in the words of status and log.
pub(super) fn engine_word(engine: Engine) -> wire::Engine {
    match engine {
        Engine::Ebpf => wire::Engine::Ebpf,
        Engine::Cbpf => wire::Engine::Cbpf,
        Engine::None => wire::Engine::None,
    }
}

/// Decides once, at start, how connections are steered.
pub(crate) fn choose(wanted: EngineChoice) -> Result<Choice, EngineError> {
    let choice = |engine, reason: &str| Ok(Choice { engine, reason: reason.to_owned() });
    match wanted {
        EngineChoice::None => choice(Engine::None, "configured; upgrades lose connections"),
        EngineChoice::Cbpf => choice(Engine::Cbpf, "configured"),
        EngineChoice::Ebpf => match try_ebpf() {
            Ok(()) => choice(Engine::Ebpf, "configured"),
            Err(why) => Err(EngineError(why)),
        },
        EngineChoice::Auto => {
            match try_ebpf() {
                Ok(()) => choice(Engine::Ebpf, "auto: the kernel accepts the program"),
                Err(why) => {
                    let mut reason = format!("auto: no ebpf ({why})");
                    if cbpf::has_rcu_fix() == Some(false) {
                        reason.push_str("; this kernel may crash when a cbpf program is replaced under traffic: update it");
                    }
                    Ok(Choice { engine: Engine::Cbpf, reason })
                }
            }
        }
    }
}

/// The one honest test: load the very program on maps of its own.
fn try_ebpf() -> Result<(), String> {
    if !capability::has_bpf() {
        return Err("CAP_BPF is missing".to_owned());
    }
    EbpfGroup::new(1, None).map(drop).map_err(|error| error.to_string())
}

/// One configured address.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Group {
    pub(super) name: String,
    #[serde(default = "default_protocol")]
    pub(super) protocol: Protocol,
    pub(super) address: SocketAddr,
    pub(super) v6only: bool,
    /// Who makes its sockets, in the latest generation.
    pub(super) bind: Bind,
    /// Where its sockets are really bound: `[::]:80` may stand for `0.0.0.0:80`.
    pub(super) bound: Option<SocketAddr>,
    ebpf: Option<Carried<EbpfGroup>>,
    /// `ebpf`, UDP: whose flows are whose.
    #[serde(default)]
    flows: Option<Carried<Flows>>,
    /// Flows it remembers at most.
    #[serde(default)]
    flow_table: u32,
    /// The plan record in force, which is never written.
    record: u32,
    /// Migrations into generations that are gone.
    migrated_before: u64,
    /// What ended workers left waiting, and others accepted.
    pub(super) leftovers_taken: u64,
    /// The same, with nobody to accept it.
    pub(super) leftovers_lost: u64,
}

impl Group {
    pub(super) fn endpoint(&self) -> Endpoint {
        Endpoint { protocol: self.protocol, address: self.address, v6only: self.v6only }
    }

    /// Room for as many flows as are wanted from now on. It is another program, attached with the next listener that is
    /// admitted, and begins with no flow known.
    fn keep_flows(&mut self, listen: &Listen) -> Result<(), BpfError> {
        let table = listen.flows.map_or(self.flow_table, |flows| flows.table);
        if let Some(ebpf) = self.ebpf.as_ref().filter(|_| self.flows.is_some() && table != self.flow_table) {
            let flows = Flows::new(table, bpf::CAPACITY_DEFAULT)?;
            self.ebpf = Some(Carried::new(ebpf.with_flows(&flows)?));
            self.flows = Some(Carried::new(flows));
            self.flow_table = table;
        }
        Ok(())
    }

    /// Until the first generation is steered to, the kernel's hash decides: the record that is in force from the
    /// beginning would refuse.
    fn unsteered(&self) -> Result<(), BpfError> {
        let Some(ebpf) = &self.ebpf else { return Ok(()) };
        let range = bpf::Range { weight_below: u32::MAX, base: EMPTY_KEY, count: 1, counter: 0, step: 0 };
        ebpf.write_plan(self.record, &Plan { ranges: vec![range] })?;
        ebpf.select(self.record)
    }
}

/// How long the kernel may take to let go of an array whose last program was replaced.
const LET_GO_PATIENCE: Duration = Duration::from_secs(1);
/// The pause before it is asked again.
const LET_GO_PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
/// The plan record before the first switch.
const FIRST_RECORD: u32 = 1;
/// A key that stays empty; the core gives out those below.
const EMPTY_KEY: u32 = bpf::CAPACITY_DEFAULT - 2;
/// The key of the listener that is being proven.
const PROOF_KEY: u32 = bpf::CAPACITY_DEFAULT - 1;

/// All groups, by the core's number for them.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Groups {
    pub(super) choice: Choice,
    by_id: BTreeMap<GroupId, Group>,
    /// The last name of each, for receipts of upgrades that ended it.
    names: BTreeMap<GroupId, String>,
    last: u16,
}

impl Groups {
    pub(super) fn new(choice: Choice) -> Groups {
        Groups { choice, by_id: BTreeMap::new(), names: BTreeMap::new(), last: 0 }
    }

    /// The groups of these addresses, in their order: those there are, and new ones with maps of their own.
    pub(super) fn open<'a>(
        &mut self,
        listen: impl Iterator<Item = &'a Listen>,
    ) -> Result<Vec<GroupId>, BpfError> {
        listen.map(|listen| self.open_one(listen)).collect()
    }

    fn open_one(&mut self, listen: &Listen) -> Result<GroupId, BpfError> {
        if let Some((id, group)) =
            self.by_id.iter_mut().find(|(_, group)| group.endpoint() == listen.endpoint())
        {
            group.keep_flows(listen)?;
            return Ok(*id);
        }
        let flow_table = listen.flows.map_or(1, |flows| flows.table);
        let is_ebpf = self.choice.engine == Engine::Ebpf;
        let flows = (is_ebpf && listen.protocol == Protocol::Udp)
            .then(|| Flows::new(flow_table, bpf::CAPACITY_DEFAULT))
            .transpose()?;
        let ebpf = is_ebpf.then(|| EbpfGroup::new(bpf::CAPACITY_DEFAULT, flows.as_ref())).transpose()?;
        let (name, address) = (listen.name.clone(), listen.address);
        let v6only = listen.v6only;
        let group = Group {
            name,
            protocol: listen.protocol,
            address,
            v6only,
            bind: listen.bind,
            bound: None,
            ebpf: ebpf.map(Carried::new),
            flows: flows.map(Carried::new),
            flow_table,
            record: FIRST_RECORD,
            migrated_before: 0,
            leftovers_taken: 0,
            leftovers_lost: 0,
        };
        group.unsteered()?;
        // The numbers of groups long gone are free again after 65,535 others.
        while self.by_id.contains_key(&GroupId(self.last)) {
            self.last = self.last.wrapping_add(1);
        }
        self.names.insert(GroupId(self.last), group.name.clone());
        self.by_id.insert(GroupId(self.last), group);
        Ok(GroupId(self.last))
    }

    /// Lets go of every group but these.
    pub(super) fn keep(&mut self, used: &BTreeSet<GroupId>) {
        self.by_id.retain(|id, _| used.contains(id));
    }

    /// Counts what an ended worker left waiting.
    pub(super) fn note_leftovers(&mut self, id: GroupId, taken: u32, lost: u32) {
        if let Some(group) = self.by_id.get_mut(&id) {
            group.leftovers_taken += u64::from(taken);
            group.leftovers_lost += u64::from(lost);
        }
    }

    /// What can differ between generations on one address is that of the latest.
    pub(super) fn rename(&mut self, id: GroupId, listen: &Listen) {
        if let Some(group) = self.by_id.get_mut(&id) {
            listen.name.clone_into(&mut group.name);
            self.names.insert(id, listen.name.clone());
            group.bind = listen.bind;
        }
    }

    /// The group of a number the core uses.
    pub(super) fn of(&self, id: GroupId) -> Option<&Group> {
        self.by_id.get(&id)
    }

    /// After a crash: the record in force may be a later one than is known.
    pub(super) fn find_record(&mut self) {
        for (id, group) in &mut self.by_id {
            match group.ebpf.as_ref().map(|ebpf| ebpf.selected()) {
                Some(Ok(record)) => group.record = record,
                Some(Err(error)) => drop(report(*id, &error)),
                None => {}
            }
        }
    }

    /// Every group with its number.
    pub(super) fn iter(&self) -> impl Iterator<Item = (GroupId, &Group)> {
        self.by_id.iter().map(|(id, group)| (*id, group))
    }

    /// Its name, for people.
    pub(super) fn name(&self, id: GroupId) -> &str {
        self.names.get(&id).map_or("?", String::as_str)
    }

    /// Notes where a worker's listener really is.
    pub(super) fn note_bound(&mut self, id: GroupId, bound: SocketAddr) {
        if let Some(group) = self.by_id.get_mut(&id) {
            group.bound = Some(bound);
        }
    }

    /// `ebpf`: a generation's listener becomes choosable under its key. The program is attached with it, since the group it
    /// was attached to before may have ended with its last socket.
    pub(super) fn admit(
        &self,
        id: GroupId,
        key: u32,
        listener: BorrowedFd<'_>,
        generation: Option<Generation>,
    ) -> Result<(), i32> {
        let ebpf = self.ebpf(id)?;
        // Whose the key is from now on: what remembers another owner is no flow of this listener.
        let flows = self.by_id.get(&id).and_then(|group| group.flows.as_ref()).zip(generation);
        let owned = flows.map_or(Ok(()), |(flows, generation)| flows.set_owner(key, generation.0));
        owned
            .and_then(|()| ebpf.attach(listener))
            .and_then(|()| ebpf.admit(key, listener))
            .map_err(|error| report(id, &error))
    }

    /// `ebpf`: flows are remembered for so long from now on, or not at all.
    pub(super) fn remember_flows(&self, id: GroupId, timeout: Option<Duration>) {
        let flows = self.by_id.get(&id).and_then(|group| group.flows.as_ref());
        if let Some(Err(error)) = flows.map(|flows| flows.set_timeout(timeout)) {
            report(id, &error);
        }
    }

    /// How long no flow's datagram has gone to this key; `None` where no flow is remembered.
    pub(super) fn quiet(&self, id: GroupId, key: Option<u32>) -> Option<Duration> {
        let flows = self.by_id.get(&id)?.flows.as_ref()?;
        let last = flows.last(key?).unwrap_or_else(|error| {
            report(id, &error);
            // Busy as far as is known.
            Some(Duration::MAX)
        });
        let now = Duration::from_nanos(clock::now().0);
        Some(last.map_or(Duration::MAX, |last| now.saturating_sub(last)))
    }

    /// Flows begun, and flows that were forgotten though they were not idle; `None` where none are remembered.
    pub(super) fn flow_counters(&self, id: GroupId) -> Option<FlowCounters> {
        let group = self.by_id.get(&id).filter(|group| group.flows.is_some())?;
        group.ebpf.as_ref()?.flow_counters().ok()
    }

    /// `ebpf`: takes the place of a program whose maps nobody has any more. Its sockets can be put into the new array
    /// once the kernel has let go of the old one, which it does soon and without a word.
    pub(super) fn replace_program(&self, id: GroupId, listener: BorrowedFd<'_>) {
        let Ok(ebpf) = self.ebpf(id) else { return };
        let deadline = Instant::now() + LET_GO_PATIENCE;
        let replaced = ebpf.attach(listener).and_then(|()| {
            loop {
                match ebpf.admit(PROOF_KEY, listener) {
                    Err(error) if error.errno() == Some(nix::libc::EBUSY) && Instant::now() < deadline => {
                        let _ = poll(&mut [], Some(&LET_GO_PAUSE));
                    }
                    result => break result.and_then(|()| ebpf.remove(PROOF_KEY)),
                }
            }
        });
        if let Err(error) = replaced {
            report(id, &error);
        }
    }

    /// `ebpf`: a foreign listener is in a group and gets the program. As long as `alone` is true it is the only one chosen,
    /// and else all of its group are.
    pub(super) fn enlist(&self, id: GroupId, listener: BorrowedFd<'_>, alone: bool) -> Result<(), BpfError> {
        let missing = || BpfError::Invalid("the engine in force has no programs".to_owned());
        let ebpf = self.by_id.get(&id).and_then(|group| group.ebpf.as_deref()).ok_or_else(missing)?;
        // In that order: another program's listener is refused before that program is replaced.
        let key = if alone { EMPTY_KEY } else { PROOF_KEY };
        ebpf.admit(key, listener).and_then(|()| ebpf.attach(listener))?;
        if alone { Ok(()) } else { ebpf.remove(key) }
    }

    /// `ebpf`: all of its group are chosen again.
    pub(super) fn end_alone(&self, id: GroupId) {
        self.evict(id, EMPTY_KEY);
    }

    /// `ebpf`: while `connect` runs, what comes from `source` is given to this listener, past all others.
    pub(super) fn past_all<T>(
        &self,
        id: GroupId,
        listener: BorrowedFd<'_>,
        key: Option<u32>,
        source: SocketAddr,
        connect: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        let ebpf = self.ebpf(id).map_err(io::Error::from_raw_os_error)?;
        let failed = |error: BpfError| io::Error::other(error);
        // A socket has one key at the most.
        if key.is_none() {
            ebpf.attach(listener).and_then(|()| ebpf.admit(PROOF_KEY, listener)).map_err(failed)?;
        }
        let probe = ebpf.set_probe(Some(Probe { remote: source, key: key.unwrap_or(PROOF_KEY) }));
        let connected = probe.map_err(failed).and_then(|()| connect());
        ebpf.set_probe(None).map_err(failed)?;
        if key.is_none() {
            ebpf.remove(PROOF_KEY).map_err(failed)?;
        }
        connected
    }

    /// `ebpf`: a key becomes empty.
    pub(super) fn evict(&self, id: GroupId, key: u32) {
        if let Ok(Err(error)) = self.ebpf(id).map(|ebpf| ebpf.remove(key)) {
            report(id, &error);
        }
    }

    /// `ebpf`: every other key becomes empty.
    pub(super) fn keep_keys(&self, id: GroupId, kept: &BTreeSet<u32>) {
        if let Ok(Err(error)) = self.ebpf(id).map(|ebpf| ebpf.retain_keys(kept)) {
            report(id, &error);
        }
    }

    /// `ebpf`: writes the plan into a free record and puts that in force by one write.
    pub(super) fn steer(&mut self, id: GroupId, ranges: &[Range]) -> Result<(), i32> {
        let Some(group) = self.by_id.get_mut(&id) else { return Err(nix::libc::ENOENT) };
        let Some(ebpf) = &group.ebpf else { return Err(nix::libc::EINVAL) };
        let below = thresholds(ranges.iter().map(|range| range.weight));
        let ranges = ranges.iter().zip(below).map(|(range, weight_below)| bpf::Range {
            weight_below,
            base: range.base,
            count: range.count,
            counter: counter(range.generation),
            step: range.step,
        });
        let plan = Plan { ranges: ranges.collect() };
        let record = (group.record + 1) % PLAN_RECORDS;
        ebpf.write_plan(record, &plan)
            .and_then(|()| ebpf.select(record))
            .map_err(|error| report(id, &error))?;
        group.record = record;
        Ok(())
    }

    /// `cbpf`: replaces the program through any socket of the group.
    pub(super) fn attach(&self, id: GroupId, shares: &[Share], member: BorrowedFd<'_>) -> Result<(), i32> {
        let below = thresholds(shares.iter().map(|share| share.weight));
        let pick = |policy| match policy {
            Policy::Cpu => Pick::Cpu,
            Policy::Hash => Pick::Hash,
        };
        let shares: Vec<cbpf::Share> = shares
            .iter()
            .zip(below)
            .map(|(share, weight_below)| {
                let (slots, pick) = (share.slots.clone(), pick(share.policy));
                cbpf::Share { weight_below, slots, pick }
            })
            .collect();
        cbpf::attach_slots(member, &shares).map_err(|error| {
            tracing::error!(listener = self.name(id), %error, "cannot attach the steering program");
            errno(&error)
        })
    }

    fn ebpf(&self, id: GroupId) -> Result<&EbpfGroup, i32> {
        self.by_id.get(&id).and_then(|group| group.ebpf.as_deref()).ok_or(nix::libc::EINVAL)
    }

    /// Connections the program has migrated so far, into generations alive or gone.
    pub(super) fn migrated(&self, id: GroupId, generations: impl Iterator<Item = Generation>) -> Option<u64> {
        let group = self.by_id.get(&id)?;
        let ebpf = group.ebpf.as_ref()?;
        let alive: Option<u64> =
            generations.map(|generation| Some(ebpf.counters(counter(generation)).ok()?.migrated)).sum();
        Some(group.migrated_before + alive?)
    }

    /// A generation begins or ends: its counters start at zero, and what they had counted is kept.
    pub(super) fn fold_counters(&mut self, generation: Generation) {
        for group in self.by_id.values_mut() {
            let Some(ebpf) = &group.ebpf else { continue };
            let counted = ebpf.counters(counter(generation)).map_or(0, |counters| counters.migrated);
            if ebpf.clear_counters(counter(generation)).is_ok() {
                group.migrated_before += counted;
            }
        }
    }
}

fn counter(generation: Generation) -> u32 {
    generation.0 % COUNTER_SLOTS
}

/// Cumulative thresholds of a random u32 for weights that are relative to their sum.
fn thresholds(weights: impl Iterator<Item = u16> + Clone) -> Vec<u32> {
    let sum: u64 = weights.clone().map(u64::from).sum::<u64>().max(1);
    let mut below = 0_u64;
    weights
        .map(|weight| {
            below += u64::from(weight);
            u32::try_from((below << 32) / sum).unwrap_or(u32::MAX)
        })
        .collect()
}

fn report(id: GroupId, error: &BpfError) -> i32 {
    tracing::error!(group = id.0, %error, "the kernel refused to steer");
    error.errno().unwrap_or(nix::libc::EINVAL)
}

/// The kernel's number for an error; EIO where it has none.
pub(super) fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(nix::libc::EIO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_become_thresholds() {
        assert_eq!(thresholds([1000].into_iter()), [u32::MAX]);
        assert_eq!(thresholds([50, 950].into_iter()), [214_748_364, u32::MAX]);
        assert_eq!(thresholds([1, 1].into_iter()), [1 << 31, u32::MAX]);
    }
}
