//! The `ebpf` engine: `bpf(2)` without a loader, an assembler without a compiler.
//!
//! [`steering::EbpfGroup`] is what the rest of the project uses; the other modules are its parts.

pub mod asm;
pub mod bind;
pub mod btf;
pub mod flows;
pub mod program;
mod raw;
pub mod steering;

pub use flows::{FlowCounters, Flows};
pub use raw::{BpfError, Kind, ids};
pub use steering::{
    CAPACITY_DEFAULT, COUNTER_SLOTS, Counters, EbpfGroup, PLAN_RECORDS, Plan, Probe, RANGE_KEYS, RANGES_MAX,
    Range,
};
