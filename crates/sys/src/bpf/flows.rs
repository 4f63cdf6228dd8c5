//! What the program for UDP remembers: which flow went to which key, and when the last datagram came.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use super::program::FlowMaps;
use super::program::flows::{FLOW_BYTES, OWNER_BYTES, TIMEOUT_ENTRY, VALUE_BYTES};
use super::raw::{self, BpfError, MapType};
use super::steering::{bytes, entry};

/// What happened to flows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowCounters {
    /// Flows begun: the first datagram, the first after the timeout, or the first after the listener has gone.
    pub begun: u64,
    /// How often a flow was forgotten before it was idle for the timeout, since others needed its place: at least so many.
    /// Processors that count at the very same time can be off by a few.
    pub overflow: u64,
}

/// The flows of one address, shared by all its listeners. A flow is remembered until its last datagram is older than the
/// timeout, and as long as the owner of its key is the same and a socket is there.
#[derive(Debug)]
pub struct Flows {
    flows: OwnedFd,
    owners: OwnedFd,
}

/// Generation that a key belongs to, and the time of the last datagram; of the first record, the timeout.
#[derive(Clone, Copy, Default)]
struct Owner {
    generation: u32,
    last: u64,
}

impl Flows {
    /// Room for so many flows, of listeners under keys below `keys`. None is remembered until there is a timeout. Each flow
    /// takes about 120 bytes of kernel memory, at once. The kernel forgets those first that had no datagram for long, but
    /// not strictly: it keeps a few places of the table free for each processor.
    ///
    /// # Errors
    /// Without CAP_BPF, without memory, or when there is to be room for none.
    pub fn new(table: u32, keys: u32) -> Result<Flows, BpfError> {
        let sizes = (bytes(FLOW_BYTES), bytes(VALUE_BYTES));
        let flows = raw::create_map(MapType::LruHash, "rupd_flows", sizes, table)?;
        let owners =
            raw::create_map(MapType::Array, "rupd_owners", (4, bytes(OWNER_BYTES)), keys.saturating_add(1))?;
        Ok(Flows { flows, owners })
    }

    /// Takes over what was carried through exec or fetched back, in the order of [`fds`](Flows::fds).
    #[must_use]
    pub fn from_fds([flows, owners]: [OwnedFd; 2]) -> Flows {
        Flows { flows, owners }
    }

    /// The descriptors: flows, owners.
    #[must_use]
    pub fn fds(&self) -> [BorrowedFd<'_>; 2] {
        [self.flows.as_fd(), self.owners.as_fd()]
    }

    pub(super) fn maps(&self) -> Result<FlowMaps, BpfError> {
        let table = raw::capacity(self.flows.as_fd());
        let table = table.map_err(|source| BpfError::Examine { map: "flows", source })?;
        Ok(FlowMaps { flows: self.flows.as_raw_fd(), owners: self.owners.as_raw_fd(), table })
    }

    /// From now on a flow is remembered for so long after its last datagram, those that are known included. `None`: no
    /// flow is kept and each datagram is chosen for by the plan; what is known is not forgotten, and would count again with
    /// the next timeout.
    ///
    /// # Errors
    /// When the map can't be written.
    pub fn set_timeout(&self, timeout: Option<Duration>) -> Result<(), BpfError> {
        // The program adds it to a time.
        let longest = u64::from(u32::MAX) << 30;
        let last =
            timeout.map_or(0, |timeout| u64::try_from(timeout.as_nanos()).unwrap_or(longest).min(longest));
        self.write(TIMEOUT_ENTRY, Owner { generation: 0, last })
    }

    /// The key belongs to this generation: flows that are remembered with another one begin anew. To be called before a
    /// listener is admitted under the key. Calling it again changes nothing.
    ///
    /// # Errors
    /// When there is no such key.
    pub fn set_owner(&self, key: u32, generation: u32) -> Result<(), BpfError> {
        match self.owner(key)?.generation == generation {
            true => Ok(()),
            false => self.write(key.saturating_add(1), Owner { generation, last: 0 }),
        }
    }

    /// When the last datagram of a flow went to this key, in CLOCK_MONOTONIC; `None` when there was none since the key has
    /// this owner.
    ///
    /// # Errors
    /// When there is no such key.
    pub fn last(&self, key: u32) -> Result<Option<Duration>, BpfError> {
        let last = self.owner(key)?.last;
        Ok((last != 0).then(|| Duration::from_nanos(last)))
    }

    fn owner(&self, key: u32) -> Result<Owner, BpfError> {
        let mut record = [0; OWNER_BYTES];
        let place = key.saturating_add(1);
        raw::lookup(self.owners.as_fd(), place, &mut record).map_err(entry("owners", "read", place))?;
        let ([generation, _, _, _], [_, last]) = (record.as_chunks::<4>().0, record.as_chunks::<8>().0)
        else {
            return Ok(Owner::default());
        };
        Ok(Owner { generation: u32::from_ne_bytes(*generation), last: u64::from_ne_bytes(*last) })
    }

    fn write(&self, place: u32, owner: Owner) -> Result<(), BpfError> {
        let mut record = [0; OWNER_BYTES];
        record[..4].copy_from_slice(&owner.generation.to_ne_bytes());
        record[8..].copy_from_slice(&owner.last.to_ne_bytes());
        raw::update(self.owners.as_fd(), place, &record).map_err(entry("owners", "write", place))
    }
}
