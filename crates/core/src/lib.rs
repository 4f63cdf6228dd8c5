//! The decisions of reuseportd, and nothing else.
//!
//! This crate never does I/O, never reads a clock, never holds a file descriptor, never formats text for people.
//! It is told what happened and when ([`Master::handle`]), and answers what is to be done ([`Master::next_command`])
//! and when it wants to be woken ([`Master::next_deadline`]). The order of calls is always: one `handle`, then
//! `next_command` until it is `None`, then the next `handle`. Whoever carries the commands out has no meaningful
//! choice left: a command that fails comes back as an event, and the answer to it is decided here.
//!
//! Being `no_std`, it can't reach a clock, a socket or an unordered map even by accident.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod adopt;
mod cbpf;
mod check;
mod command;
mod datagram;
mod drained;
mod ebpf;
mod event;
mod fail;
mod foreign;
mod generation;
mod group;
mod id;
mod keeper;
mod launch;
mod master;
mod plan;
mod queue;
mod ready;
mod receipt;
mod reexec;
mod restart;
mod retire;
mod roll;
mod scale;
mod seats;
mod settle;
mod slots;
mod status;
mod steer;
mod stop;
mod supervise;
mod timers;
mod trial;
mod watch;
mod watchdog;
mod worker;

pub use command::{Asked, Command, Notice, Order, Range, Reason, Report, Share, Signal};
pub use event::{
    CheckFailure, Depth, Event, Exit, Found, GroupView, Member, Number, Problem, StopMode, Trigger, Verdict,
    Wait,
};
pub use generation::GenerationState;
pub use id::{Generation, GroupId, ListenerId, RetirementId, Seat, Ticket, Time, WorkerId};
pub use master::{Master, MasterState};
pub use plan::{Breaker, CanaryStep, Engine, Plan, Policy, Readiness, StopWhen};
pub use queue::Before;
pub use receipt::{Outcome, Phase, PhaseTime, Receipt, ReceiptListener};
pub use status::{GenerationView, ListenerView, StatusView, WorkerView};
pub use worker::{WorkerKind, WorkerState};
