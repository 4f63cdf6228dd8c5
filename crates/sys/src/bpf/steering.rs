//! One listener address under the `ebpf` engine: its maps, its program, and the one word that switches it.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use super::flows::{FlowCounters, Flows};
use super::program::{
    self, CONTROL_PLAN, CONTROL_PROBE, COUNTER_BYTES, COUNTER_FLOWS, COUNTER_GROUP, COUNTER_WINDOW, Maps,
    PROBE_BYTES, RANGE_BYTES, RANGE_KEYS_MAX,
};
use super::raw::{self, BpfError, MapType};
use crate::socket;

/// Plan records a group holds; a caller writes one that is not in force, then selects it.
pub const PLAN_RECORDS: u32 = 64;
/// Counter slots a plan's ranges may count in.
pub const COUNTER_SLOTS: u32 = COUNTER_GROUP;
/// Ranges a plan may have.
pub const RANGES_MAX: usize = program::RANGES;
/// Keys a range may have.
pub const RANGE_KEYS: u32 = RANGE_KEYS_MAX;
/// Keys of a group unless told otherwise.
pub const CAPACITY_DEFAULT: u32 = 8192;
/// Entries of the plans map per record.
const RANGES: u32 = 4;
/// Probe records are 1 and 2: one in force, one to be written.
const PROBE_RECORDS: u32 = 3;

/// A block of keys that gets a share of the new connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The range is chosen when a random u32, or one made of the flow (UDP), is below this (ranges are asked in order); the
    /// last range of a plan catches all.
    pub weight_below: u32,
    /// First key.
    pub base: u32,
    /// Number of keys, at most [`RANGE_KEYS`]; keys without a listener are skipped.
    pub count: u32,
    /// Counter slot, below [`COUNTER_SLOTS`].
    pub counter: u32,
    /// Where the search begins: 0 by the hash of addresses and ports, otherwise at the processor's number times this,
    /// which is the number of keys to a seat. Both modulo `count`.
    pub step: u32,
}

/// Where connections go: immutable once it is in force. Without ranges new connections are refused at once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// At most [`RANGES_MAX`].
    pub ranges: Vec<Range>,
}

/// A SYN from exactly this source reaches this key's listener before anybody else does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Source address and port of the probing socket.
    pub remote: SocketAddr,
    /// Key of the listener under test.
    pub key: u32,
}

/// What a range's listeners were given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// New connections; of UDP new flows, or, while none are remembered, datagrams.
    pub new: u64,
    /// Connections and half-open handshakes moved here from a listener that closed.
    pub migrated: u64,
}

/// What happened to connections that no range took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GroupCounters {
    /// New connections (datagrams) refused because the plan in force has no ranges.
    pub refused: u64,
    /// Connections (datagrams) left to the kernel's own hash: no key of the plan held a listener.
    pub unsteered: u64,
}

/// Maps and program of one listener address.
#[derive(Debug)]
pub struct EbpfGroup {
    sockets: OwnedFd,
    plans: OwnedFd,
    control: OwnedFd,
    counters: OwnedFd,
    probes: OwnedFd,
    program: OwnedFd,
}

impl EbpfGroup {
    /// Creates the maps and loads the program: for TCP, or for UDP if flows are given. Nothing is attached and the last plan
    /// record, which is empty, is in force: write and select a plan before [`attach`](EbpfGroup::attach), or new connections
    /// are refused.
    ///
    /// # Errors
    /// Without CAP_BPF, or when the kernel's verifier refuses the program (its log is in the error).
    pub fn new(capacity: u32, flows: Option<&Flows>) -> Result<EbpfGroup, BpfError> {
        let array = |name, value, entries| raw::create_map(MapType::Array, name, (4, bytes(value)), entries);
        let sockets = raw::create_map(MapType::ReuseportSockarray, "rupd_sockets", (4, 8), capacity)?;
        let plans = array("rupd_plans", RANGE_BYTES, PLAN_RECORDS * RANGES)?;
        let control = array("rupd_control", 4, 2)?;
        let counters = array("rupd_counters", COUNTER_BYTES, COUNTER_WINDOW + 1)?;
        let probes = array("rupd_probes", PROBE_BYTES, PROBE_RECORDS)?;
        let group = EbpfGroup::with_program([sockets, plans, control, counters, probes], flows)?;
        group.select(PLAN_RECORDS - 1)?;
        Ok(group)
    }

    fn with_program(maps: [OwnedFd; 5], flows: Option<&Flows>) -> Result<EbpfGroup, BpfError> {
        let flows = flows.map(Flows::maps).transpose()?;
        let [sockets, plans, control, counters, probes] = maps.each_ref().map(AsRawFd::as_raw_fd);
        let program = program::build(&Maps { sockets, plans, control, counters, probes, flows })?;
        let program = raw::load_program("rupd_steer", raw::STEER, &program)?;
        let [sockets, plans, control, counters, probes] = maps;
        Ok(EbpfGroup { sockets, plans, control, counters, probes, program })
    }

    /// The same group with a program that remembers flows there, for a table of another size: what is known of flows is
    /// forgotten as soon as it is [attached](EbpfGroup::attach). Listeners, plans and counters are shared with this one.
    ///
    /// # Errors
    /// As for [`new`](EbpfGroup::new), or when descriptors run out.
    pub fn with_flows(&self, flows: &Flows) -> Result<EbpfGroup, BpfError> {
        let [sockets, plans, control, counters, probes, _] =
            self.fds().map(|fd| fd.try_clone_to_owned().map_err(BpfError::Duplicate));
        EbpfGroup::with_program([sockets?, plans?, control?, counters?, probes?], Some(flows))
    }

    /// Takes over a group whose descriptors were carried through exec or fetched back, in the order of
    /// [`fds`](EbpfGroup::fds).
    #[must_use]
    pub fn from_fds([sockets, plans, control, counters, probes, program]: [OwnedFd; 6]) -> EbpfGroup {
        EbpfGroup { sockets, plans, control, counters, probes, program }
    }

    /// The descriptors: sockets, plans, control, counters, probes, program. As long as somebody holds them the
    /// group can be switched.
    #[must_use]
    pub fn fds(&self) -> [BorrowedFd<'_>; 6] {
        [&self.sockets, &self.plans, &self.control, &self.counters, &self.probes, &self.program]
            .map(AsFd::as_fd)
    }

    /// Puts the program in force for the reuseport group the listener belongs to (any member will do).
    ///
    /// # Errors
    /// When the socket is not in a reuseport group.
    pub fn attach(&self, listener: BorrowedFd<'_>) -> Result<(), BpfError> {
        let program = self.program.as_raw_fd();
        socket::set_option(listener, libc::SO_ATTACH_REUSEPORT_EBPF, program).map_err(BpfError::Attach)
    }

    /// Takes the program, whichever it is, from the reuseport group the listener belongs to: the kernel chooses by hash.
    ///
    /// # Errors
    /// ENOENT when there is none.
    pub fn detach(listener: BorrowedFd<'_>) -> Result<(), BpfError> {
        socket::set_option(listener, libc::SO_DETACH_REUSEPORT_BPF, 0).map_err(BpfError::Attach)
    }

    /// Makes a listener choosable under `key`, in place of whatever was there. The listener must already
    /// listen, and can be in one array only. One that is in this array already is fine: from another key it is moved,
    /// and for a moment no key has it.
    ///
    /// # Errors
    /// EINVAL when the socket doesn't listen with SO_REUSEPORT, EBUSY when it is in another group's array, E2BIG when
    /// the key is beyond the capacity.
    pub fn admit(&self, key: u32, listener: BorrowedFd<'_>) -> Result<(), BpfError> {
        let value = i64::from(listener.as_raw_fd()).to_ne_bytes();
        let write = || raw::update(self.sockets.as_fd(), key, &value).map_err(entry("sockets", "write", key));
        match write() {
            Err(error) if error.errno() == Some(libc::EBUSY) => match self.key_of(listener)? {
                Some(at) if at == key => Ok(()),
                Some(at) => self.remove(at).and_then(|()| write()),
                None => Err(error),
            },
            result => result,
        }
    }

    /// The key a listener is under. Looks at every key, which takes some milliseconds.
    fn key_of(&self, listener: BorrowedFd<'_>) -> Result<Option<u32>, BpfError> {
        let cookie = socket::cookie(listener).map_err(|source| {
            BpfError::Invalid(format!("cannot tell which socket a listener is: {source}"))
        })?;
        for key in self.keys()? {
            if self.cookie_at(key)? == Some(cookie) {
                return Ok(Some(key));
            }
        }
        Ok(None)
    }

    fn keys(&self) -> Result<std::ops::Range<u32>, BpfError> {
        let examined = raw::capacity(self.sockets.as_fd());
        examined.map(|end| 0..end).map_err(|source| BpfError::Examine { map: "sockets", source })
    }

    /// Empties every key but these: after a crash nobody may know any more what was put there. Takes some
    /// milliseconds.
    ///
    /// # Errors
    /// When the map can't be read or written.
    pub fn retain_keys(&self, keys: &BTreeSet<u32>) -> Result<(), BpfError> {
        self.keys()?.filter(|key| !keys.contains(key)).try_for_each(|key| self.remove(key))
    }

    /// Makes the listener under `key` unchoosable; an empty key is fine, the kernel empties it when the
    /// listener closes.
    ///
    /// # Errors
    /// When the key is beyond the capacity.
    pub fn remove(&self, key: u32) -> Result<(), BpfError> {
        match raw::delete(self.sockets.as_fd(), key) {
            Err(source) if source.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            result => result.map_err(entry("sockets", "remove", key)),
        }
    }

    /// The cookie of the listener under `key`, if there is one.
    ///
    /// # Errors
    /// When the map can't be read.
    pub fn cookie_at(&self, key: u32) -> Result<Option<u64>, BpfError> {
        let mut value = [0; 8];
        match raw::lookup(self.sockets.as_fd(), key, &mut value) {
            Ok(()) => Ok(Some(u64::from_ne_bytes(value))),
            Err(source) if source.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(source) => Err(entry("sockets", "read", key)(source)),
        }
    }

    /// Writes a plan record. Never the one in force: an update larger than a word can be read half done.
    ///
    /// # Errors
    /// [`BpfError::Invalid`] when the record is in force, or the plan has more ranges, keys or counters than
    /// there is room for.
    pub fn write_plan(&self, index: u32, plan: &Plan) -> Result<(), BpfError> {
        if self.selected()? == index {
            return Err(BpfError::Invalid(format!(
                "plan record {index} is in force and must not be written; write another and select it"
            )));
        }
        for (key, record) in (index * RANGES..).zip(encode_plan(plan)?) {
            raw::update(self.plans.as_fd(), key, &record).map_err(entry("plans", "write", key))?;
        }
        Ok(())
    }

    /// Puts a plan record in force with one aligned 32-bit write: the switch.
    ///
    /// # Errors
    /// When there is no such record.
    pub fn select(&self, index: u32) -> Result<(), BpfError> {
        if index >= PLAN_RECORDS {
            return Err(BpfError::Invalid(format!(
                "there is no plan record {index}, only 0 to {}",
                PLAN_RECORDS - 1
            )));
        }
        self.write_control(CONTROL_PLAN, index)
    }

    /// The plan record in force.
    ///
    /// # Errors
    /// When the map can't be read.
    pub fn selected(&self) -> Result<u32, BpfError> {
        self.read_control(CONTROL_PLAN)
    }

    /// Sets or clears the probe.
    ///
    /// # Errors
    /// When a map can't be written.
    pub fn set_probe(&self, probe: Option<Probe>) -> Result<(), BpfError> {
        let Some(probe) = probe else { return self.write_control(CONTROL_PROBE, 0) };
        let spare = if self.read_control(CONTROL_PROBE)? == 1 { 2 } else { 1 };
        raw::update(self.probes.as_fd(), spare, &encode_probe(&probe))
            .map_err(entry("probes", "write", spare))?;
        self.write_control(CONTROL_PROBE, spare)
    }

    /// What a counter slot has counted since it was cleared.
    ///
    /// # Errors
    /// When there is no such slot.
    pub fn counters(&self, slot: u32) -> Result<Counters, BpfError> {
        let [new, migrated] = self.read_counters(slot)?;
        Ok(Counters { new, migrated })
    }

    /// What no range took, since the group was made.
    ///
    /// # Errors
    /// When the map can't be read.
    pub fn group_counters(&self) -> Result<GroupCounters, BpfError> {
        let [refused, unsteered] = self.read_counters(COUNTER_GROUP)?;
        Ok(GroupCounters { refused, unsteered })
    }

    /// What happened to flows, since the group was made. Only of UDP.
    ///
    /// # Errors
    /// When the map can't be read.
    pub fn flow_counters(&self) -> Result<FlowCounters, BpfError> {
        let [begun, overflow] = self.read_counters(COUNTER_FLOWS)?;
        Ok(FlowCounters { begun, overflow })
    }

    /// Sets a counter slot to zero. Counts of connections arriving at this very moment may be lost, so clear
    /// a slot only while no plan in force names it.
    ///
    /// # Errors
    /// When there is no such slot.
    pub fn clear_counters(&self, slot: u32) -> Result<(), BpfError> {
        raw::update(self.counters.as_fd(), slot, &[0; COUNTER_BYTES])
            .map_err(entry("counters", "write", slot))
    }

    fn read_counters(&self, slot: u32) -> Result<[u64; 2], BpfError> {
        let mut value = [0; COUNTER_BYTES];
        raw::lookup(self.counters.as_fd(), slot, &mut value).map_err(entry("counters", "read", slot))?;
        let (words, _) = value.as_chunks::<8>();
        Ok([u64::from_ne_bytes(words[0]), u64::from_ne_bytes(words[1])])
    }

    fn read_control(&self, key: u32) -> Result<u32, BpfError> {
        let mut value = [0; 4];
        raw::lookup(self.control.as_fd(), key, &mut value).map_err(entry("control", "read", key))?;
        Ok(u32::from_ne_bytes(value))
    }

    fn write_control(&self, key: u32, value: u32) -> Result<(), BpfError> {
        raw::update(self.control.as_fd(), key, &value.to_ne_bytes()).map_err(entry("control", "write", key))
    }
}

pub(super) fn bytes(size: usize) -> u32 {
    u32::try_from(size).unwrap_or(u32::MAX)
}

pub(super) fn entry(
    map: &'static str,
    action: &'static str,
    key: u32,
) -> impl FnOnce(std::io::Error) -> BpfError {
    move |source| BpfError::Entry { map, action, key, source }
}

pub(super) fn encode_plan(plan: &Plan) -> Result<[[u8; RANGE_BYTES]; RANGES_MAX], BpfError> {
    let number = plan.ranges.len();
    if number > RANGES_MAX {
        return Err(BpfError::Invalid(format!("a plan has at most {RANGES_MAX} ranges, not {number}")));
    }
    if let Some(range) = plan.ranges.iter().find(|range| range.count > RANGE_KEYS) {
        return Err(BpfError::Invalid(format!("a range has at most {RANGE_KEYS} keys, not {}", range.count)));
    }
    if let Some(range) = plan.ranges.iter().find(|range| range.counter >= COUNTER_SLOTS) {
        return Err(BpfError::Invalid(format!(
            "there is no counter slot {}, only 0 to {}",
            range.counter,
            COUNTER_SLOTS - 1
        )));
    }
    let mut records = [[0; RANGE_BYTES]; RANGES_MAX];
    for ((index, range), record) in plan.ranges.iter().enumerate().zip(&mut records) {
        // The last one catches all: its weight is beyond any random u32.
        let weight = if index + 1 == number { 1 << 32 } else { u64::from(range.weight_below) };
        record[..8].copy_from_slice(&weight.to_ne_bytes());
        let words = [range.base, range.count, range.counter, range.step];
        record[8..].copy_from_slice(&encode::<16>(words.into_iter()));
    }
    Ok(records)
}

pub(super) fn encode_probe(probe: &Probe) -> [u8; PROBE_BYTES] {
    let remote = probe.remote.ip().to_canonical();
    let mut address = [0; 16];
    match remote {
        IpAddr::V4(ip) => address[..4].copy_from_slice(&ip.octets()),
        IpAddr::V6(ip) => address.copy_from_slice(&ip.octets()),
    }
    let (quads, _) = address.as_chunks::<4>();
    let words = [program::eth_protocol(remote.is_ipv6()), u32::from(probe.remote.port().to_be())]
        .into_iter()
        .chain(quads.iter().map(|quad| u32::from_ne_bytes(*quad)))
        .chain([probe.key]);
    encode(words)
}

/// Lays words out as the program reads them; what is not given is zero.
fn encode<const N: usize>(words: impl Iterator<Item = u32>) -> [u8; N] {
    let mut record = [0; N];
    for (bytes, word) in record.chunks_exact_mut(4).zip(words) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    record
}
