//! One SO_REUSEPORT group and what is being done to it. At most one thing at a time: the kernel's answer to the one
//! decides about the next.

use crate::command::{Range, Share};
use crate::event::Depth;
use crate::id::{Generation, GroupId, ListenerId, Seat, Time, WorkerId};
use crate::slots::{Keys, Slots};
use alloc::collections::BTreeSet;
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

/// One listening (or bound) socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Listener {
    pub(crate) group: GroupId,
    pub(crate) generation: Generation,
    pub(crate) worker: WorkerId,
    pub(crate) seat: Seat,
    /// The master made it for the seat, and hands it to the seat's next worker. With it goes `worker` and `generation`.
    pub(crate) of_seat: bool,
    /// The master holds a duplicate.
    pub(crate) handle: bool,
    /// It listens; before that it has no slot and can't be chosen.
    pub(crate) listens: bool,
    /// Nobody accepts from it any more: it leaves as soon as that loses nothing.
    pub(crate) leaving: bool,
    /// Leave by `shutdown()`, since others still hold the socket.
    pub(crate) by_shutdown: bool,
    /// `ebpf`: its place in the array.
    pub(crate) key: Option<u32>,
    /// `cbpf`: what of begun handshakes it has to wait for.
    pub(crate) settling: Settling,
    /// As of the last look; `None` before the first.
    pub(crate) depth: Option<Depth>,
    /// How often a worker was asked to take what waits in it.
    pub(crate) asked: u8,
    /// In the last look it was not there any more.
    pub(crate) gone: bool,
    /// Since then no flow is kept for it any more.
    #[serde(default)]
    pub(crate) flows_ended: Option<Time>,
}

/// Whether handshakes of a listener may still be half open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Settling {
    /// It is, or was, chosen.
    Chosen,
    /// Steered away from; from this look on the half-open handshakes are the ones that began before.
    Begun {
        /// Not before.
        look: Time,
        /// No longer than.
        until: Time,
    },
    /// These are still half open, and may be its.
    Watched {
        /// By the kernel's cookie.
        begun: Vec<u64>,
        /// No longer than.
        until: Time,
    },
    /// None, or it was never chosen.
    Settled,
}

/// What is in force in the kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum InForce {
    /// The kernel's own hash.
    Nothing,
    /// The kernel refused the last change.
    Unknown,
    /// `ebpf`.
    Ranges(Vec<Range>),
    /// `cbpf`.
    Shares(Vec<Share>),
}

/// What is being done to a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Work {
    /// Nothing.
    Idle,
    /// `ebpf`: waiting until all that may be chosen is under keys, in order to steer.
    Admitting,
    /// `cbpf`: reading the slots, in order to do this.
    Surveying(After),
    /// Waiting for the kernel's answer, in order to do this.
    Steering(After),
    /// The kernel refused; tried again when the timer fires.
    Refused,
}

/// What a step is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum After {
    /// Steer to the target.
    Steer,
    /// Release this listener.
    Release(ListenerId),
}

/// A group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Group {
    /// Its sockets take datagrams: they are in the group from `bind()` on, each is held by the master, and nothing migrates.
    #[serde(default)]
    pub(crate) is_datagram: bool,
    /// Who new connections should go to; weights add up to 1000. Empty: nobody.
    pub(crate) target: Vec<(Generation, u16)>,
    /// The target, or who can be chosen in it, changed since the kernel was last told.
    pub(crate) is_stale: bool,
    pub(crate) work: Work,
    /// `cbpf`: a sibling was asked to accept the leftovers of this listener. Meanwhile the group is steered, but nothing else
    /// leaves it.
    pub(crate) taking: Option<ListenerId>,
    pub(crate) in_force: InForce,
    /// Orphans serve here, but no handle of any could be had.
    pub(crate) has_unseen: bool,
    /// `ebpf`: another master may have put listeners under keys that nothing is known of.
    pub(crate) is_inherited: bool,
    /// `ebpf`: keys not confirmed yet.
    pub(crate) admitting: u32,
    /// `ebpf`: those of them of which a handle is to be had first.
    #[serde(default)]
    pub(crate) reaching: BTreeSet<ListenerId>,
    /// `ebpf`: one of them was refused.
    pub(crate) admit_failed: Option<i32>,
    /// Looks that are not answered yet.
    pub(crate) looks: u32,
    /// How many of them show the group before its last change.
    pub(crate) looks_outdated: u32,
    pub(crate) slots: Slots,
    /// `cbpf`: a socket that was let go of; whether it has left shows in the next look.
    #[serde(default)]
    pub(crate) released: Option<u64>,
    /// `cbpf`: the slots before a socket left by the master's hand, and that socket. Whether another one left before it shows
    /// in the next look; which was the first does not.
    #[serde(default)]
    pub(crate) before: Option<(Slots, u64)>,
    pub(crate) keys: Keys,
    /// `ebpf`, unmodified workers: the one listener the master holds, so that the group never gets empty.
    pub(crate) anchor: Option<ListenerId>,
    /// Asked for, to become the anchor.
    pub(crate) anchoring: Option<ListenerId>,
    /// As of the last look.
    pub(crate) half_open: Vec<u64>,
    pub(crate) migrated: Option<u64>,
    pub(crate) migrate_failures: Option<u64>,
    pub(crate) migrates_by_hash: bool,
}

impl Group {
    pub(crate) fn new() -> Group {
        Group {
            is_datagram: false,
            target: Vec::new(),
            is_stale: false,
            work: Work::Idle,
            taking: None,
            in_force: InForce::Nothing,
            has_unseen: false,
            is_inherited: false,
            admitting: 0,
            reaching: BTreeSet::new(),
            admit_failed: None,
            looks: 0,
            looks_outdated: 0,
            slots: Slots::default(),
            released: None,
            before: None,
            keys: Keys::default(),
            anchor: None,
            anchoring: None,
            half_open: Vec::new(),
            migrated: None,
            migrate_failures: None,
            migrates_by_hash: false,
        }
    }

    /// Whether new connections should go to this generation.
    pub(crate) fn wants(&self, generation: Generation) -> bool {
        self.target.iter().any(|(wanted, _)| *wanted == generation)
    }

    /// Whether the kernel was told who is wanted, and agreed.
    pub(crate) fn is_told(&self) -> bool {
        !self.is_stale
            && !matches!(
                self.work,
                Work::Admitting | Work::Steering(_) | Work::Surveying(After::Steer) | Work::Refused
            )
    }

    /// Whether the kernel does what is wanted.
    pub(crate) fn is_steered(&self) -> bool {
        !self.is_stale && self.work == Work::Idle
    }
}
