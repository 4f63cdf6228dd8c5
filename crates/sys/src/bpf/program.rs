//! The `sk_reuseport` program: which listener of a group gets a connection.
//!
//! In C it would read:
//!
//! ```c
//! int steer(struct sk_reuseport_md *ctx) {                 // of TCP; for UDP see `flows`
//!     if (!ctx->migrating_sk && probes[control[PROBE]] matches the SYN's source
//!         && select(ctx, sockets, probe->key) == 0)
//!         return SK_PASS;
//!     ranges = &plans[control[PLAN] * RANGES];     // the last one's weight is beyond any random u32
//!     first = the first range with random < range->weight;
//!     if (none)                                    // stopping: new ones are refused, begun ones may move
//!         return ctx->migrating_sk ? SK_PASS : SK_DROP;
//!     for (range in first, then all in order)
//!         for (key in range, starting at (range->step ? cpu * range->step : hash) % count, wrapping around)
//!             if (select(ctx, sockets, key) == 0) { count(range->counter); return SK_PASS; }
//!     count(unsteered);
//!     return SK_PASS;                              // nobody there: the kernel's own hash decides
//! }
//! ```
//!
//! There is no jump backwards: with CAP_BPF alone (no CAP_PERFMON) the verifier also follows branches the processor
//! might only guess, on which a loop's counter is unknown and the loop looks endless. Instead a function that tries
//! one key is called 32 times by one that is called 32 times; type information ([`super::btf`]) lets the verifier
//! look at each of them once. For the same reason ranges are map entries and not fields of a larger record: a
//! computed offset would be refused.

use super::asm::{AsmError, Assembler, Cond, Insn, Op, Reg, Size};
use super::btf::Function;
use Reg::{R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10};
use Size::{Double, Half, Word};

/// Keys a range may have: 32 x 32.
pub const RANGE_KEYS_MAX: u32 = 1024;
/// Entries of the plans map that make one plan record; unused ones are zero.
pub const RANGES: usize = 4;
const RANGES_I32: i32 = 4;
/// Entry of the control map that names the plan record in force.
pub const CONTROL_PLAN: u32 = 0;
/// Entry of the control map that names the probe record in force; 0 is none.
pub const CONTROL_PROBE: u32 = 1;
/// Counter record for the group as a whole: first word refused, second word unsteered.
pub const COUNTER_GROUP: u32 = 64;
/// Counter record of flows: first word begun, second word overflow.
pub const COUNTER_FLOWS: u32 = 65;
/// Record of the window in which new entries of the flow table are counted: when it began, and how many there were.
pub const COUNTER_WINDOW: u32 = 66;

/// Bytes of one range: weight (u64), base, count, counter, step.
pub const RANGE_BYTES: usize = 24;
/// Bytes of a probe record: protocol, port, address (16), key, padding.
pub const PROBE_BYTES: usize = 32;
/// Bytes of a counter record: two u64.
pub const COUNTER_BYTES: usize = 16;

const RANGE_WEIGHT: i16 = 0;
const RANGE_BASE: i16 = 8;
const RANGE_COUNT: i16 = 12;
const RANGE_COUNTER: i16 = 16;
const RANGE_STEP: i16 = 20;

const PROBE_PROTOCOL: i16 = 0;
const PROBE_PORT: i16 = 4;
const PROBE_ADDRESS: i16 = 8;
const PROBE_KEY: i16 = 24;

// struct sk_reuseport_md
const CTX_DATA: i16 = 0;
const CTX_DATA_END: i16 = 8;
const CTX_ETH_PROTOCOL: i16 = 20;
const CTX_HASH: i16 = 32;
const CTX_MIGRATING: i16 = 48;

const HELPER_MAP_LOOKUP: i32 = 1;
const HELPER_RANDOM: i32 = 7;
const HELPER_CPU: i32 = 8;
const HELPER_LOAD_BYTES_RELATIVE: i32 = 68;
const HELPER_SELECT: i32 = 82;
const HEADER_START_NET: i32 = 1;
const SK_DROP: i32 = 0;
const SK_PASS: i32 = 1;

// The stack frame.
const KEY: i16 = -4;
const COUNTER: i16 = -8;
const ADDRESS: i16 = -24;
/// Of a function that calls another again and again: where in the range to start.
const START: i16 = -8;

/// The program's maps, as descriptors of this process.
#[derive(Clone, Copy, Debug)]
pub struct Maps {
    /// REUSEPORT_SOCKARRAY of admitted listeners.
    pub sockets: i32,
    /// ARRAY of ranges, [`RANGES`] to a plan record.
    pub plans: i32,
    /// ARRAY of u32: which records are in force.
    pub control: i32,
    /// ARRAY of counter records.
    pub counters: i32,
    /// ARRAY of probe records.
    pub probes: i32,
    /// What makes it a program for UDP.
    pub flows: Option<FlowMaps>,
}

/// The maps that remember flows.
#[derive(Clone, Copy, Debug)]
pub struct FlowMaps {
    /// LRU_HASH of flow records.
    pub flows: i32,
    /// Its entries.
    pub table: u32,
    /// ARRAY of owner records: the timeout, then one for each key.
    pub owners: i32,
}

/// Instructions and the functions they make up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// All instructions.
    pub insns: Vec<Insn>,
    /// Its functions in order; the first is where the kernel enters.
    pub functions: Vec<Function>,
}

/// `Ethernet` protocol number as the context shows it: network byte order in a u32.
#[must_use]
pub fn eth_protocol(ipv6: bool) -> u32 {
    u32::from(if ipv6 { 0x86dd_u16 } else { 0x0800 }.to_be())
}

/// Puts the program together.
///
/// # Errors
/// Never with the program as it is written; the type keeps a mistake from becoming a wrong jump.
pub fn build(maps: &Maps) -> Result<Program, AsmError> {
    let mut asm = Assembler::new();
    asm.alu(Op::Mov, R6, R1);
    match &maps.flows {
        None => {
            probe(&mut asm, maps);
            choose_range(&mut asm, maps);
            try_ranges(&mut asm, maps);
        }
        Some(table) => {
            choose_range(&mut asm, maps);
            flows::go_on(&mut asm, maps, table);
            try_ranges(&mut asm, maps);
            flows::begin(&mut asm, maps, table);
        }
    }
    ends(&mut asm, maps);
    let functions = functions(&mut asm, maps);
    Ok(Program { insns: asm.finish()?, functions })
}

/// R0 = address of `map[key on the stack]`; goes to `missing` when there is none.
fn lookup(asm: &mut Assembler, map: i32, missing: &'static str) {
    lookup_at(asm, map, KEY, missing);
}

/// The same with the key at this place of the stack.
fn lookup_at(asm: &mut Assembler, map: i32, key: i16, missing: &'static str) {
    asm.load_map(R1, map);
    stack_address(asm, R2, key);
    asm.call(HELPER_MAP_LOOKUP);
    asm.jump_if_imm(Cond::Eq, R0, 0, missing);
}

fn stack_address(asm: &mut Assembler, to: Reg, place: i16) {
    asm.alu(Op::Mov, to, R10);
    asm.alu_imm(Op::Add, to, i32::from(place));
}

/// The counter at R0 goes up by one.
fn count(asm: &mut Assembler) {
    asm.alu_imm(Op::Mov, R1, 1);
    asm.atomic_add(R0, 0, R1);
}

/// R0 = result of selecting the socket under the key on the stack.
fn select(asm: &mut Assembler, maps: &Maps) {
    asm.alu(Op::Mov, R1, R6);
    asm.load_map(R2, maps.sockets);
    stack_address(asm, R3, KEY);
    asm.alu_imm(Op::Mov, R4, 0);
    asm.call(HELPER_SELECT);
}

/// R1 = the packet's source port; the context's data starts at the TCP or UDP header.
fn load_source_port(asm: &mut Assembler, missing: &'static str) {
    asm.load(Double, R1, R6, CTX_DATA);
    asm.load(Double, R2, R6, CTX_DATA_END);
    asm.alu(Op::Mov, R3, R1);
    asm.alu_imm(Op::Add, R3, 4);
    asm.jump_if(Cond::Gt, R3, R2, missing);
    asm.load(Half, R1, R1, 0);
}

/// Writes the packet's source address to the stack, or two: the destination behind it. `protocol` is the context's.
fn load_addresses(asm: &mut Assembler, protocol: Reg, place: i16, number: i32, missing: &'static str) {
    asm.alu(Op::Mov, R1, R6);
    stack_address(asm, R3, place);
    asm.alu_imm(Op::Mov, R5, HEADER_START_NET);
    asm.jump_if_imm(Cond::Eq, protocol, eth_protocol(true).cast_signed(), "ipv6");
    asm.alu_imm(Op::Mov, R2, 12);
    asm.alu_imm(Op::Mov, R4, 4 * number);
    asm.call(HELPER_LOAD_BYTES_RELATIVE);
    asm.jump("loaded");
    asm.label("ipv6");
    asm.alu_imm(Op::Mov, R2, 8);
    asm.alu_imm(Op::Mov, R4, 16 * number);
    asm.call(HELPER_LOAD_BYTES_RELATIVE);
    asm.label("loaded");
    asm.jump_if_imm(Cond::Ne, R0, 0, missing);
}

/// A SYN from exactly the probe's source goes to the probe's key; anything else falls through to "plan".
fn probe(asm: &mut Assembler, maps: &Maps) {
    // A migration may come with an empty packet: nothing to read there.
    asm.load(Double, R1, R6, CTX_MIGRATING);
    asm.jump_if_imm(Cond::Ne, R1, 0, "plan");
    asm.store_imm(Word, R10, KEY, CONTROL_PROBE.cast_signed());
    lookup(asm, maps.control, "plan");
    asm.load(Word, R1, R0, 0);
    asm.jump_if_imm(Cond::Eq, R1, 0, "plan");
    asm.store(Word, R10, KEY, R1);
    lookup(asm, maps.probes, "plan");
    asm.alu(Op::Mov, R8, R0);
    asm.load(Word, R1, R8, PROBE_PROTOCOL);
    asm.load(Word, R9, R6, CTX_ETH_PROTOCOL);
    asm.jump_if(Cond::Ne, R1, R9, "plan");
    load_source_port(asm, "plan");
    asm.load(Word, R2, R8, PROBE_PORT);
    asm.jump_if(Cond::Ne, R1, R2, "plan");
    asm.store_imm(Double, R10, ADDRESS, 0);
    asm.store_imm(Double, R10, ADDRESS + 8, 0);
    load_addresses(asm, R9, ADDRESS, 1, "plan");
    for half in [0, 8] {
        asm.load(Double, R1, R10, ADDRESS + half);
        asm.load(Double, R2, R8, PROBE_ADDRESS + half);
        asm.jump_if(Cond::Ne, R1, R2, "plan");
    }
    asm.load(Word, R1, R8, PROBE_KEY);
    asm.store(Word, R10, KEY, R1);
    select(asm, maps);
    // A probed worker that has gone is no reason to lose the client.
    asm.jump_if_imm(Cond::Ne, R0, 0, "plan");
    asm.alu_imm(Op::Mov, R0, SK_PASS);
    asm.exit();
}

/// R8 = key of the plan's first range, R0 = record of the range chosen by weight.
fn choose_range(asm: &mut Assembler, maps: &Maps) {
    asm.label("plan");
    asm.store_imm(Word, R10, KEY, CONTROL_PLAN.cast_signed());
    lookup(asm, maps.control, "unsteered");
    asm.load(Word, R8, R0, 0);
    asm.alu_imm(Op::Shl, R8, RANGES.ilog2().cast_signed());
    match maps.flows {
        None => {
            asm.call(HELPER_RANDOM);
            asm.alu(Op::Mov, R7, R0);
        }
        Some(_) => flows::draw(asm),
    }
    for index in 0..RANGES_I32 {
        lookup_range(asm, maps, index);
        asm.load(Double, R1, R0, RANGE_WEIGHT);
        asm.jump_if(Cond::Lt, R7, R1, "chosen");
    }
    asm.jump("closed");
    asm.label("chosen");
}

/// R0 = record of the plan's range `index`.
fn lookup_range(asm: &mut Assembler, maps: &Maps, index: i32) {
    asm.alu(Op::Mov, R1, R8);
    asm.alu_imm(Op::Add, R1, index);
    asm.store(Word, R10, KEY, R1);
    lookup(asm, maps.plans, "unsteered");
}

/// The chosen range (its record in R0) is tried first, then all in order, and the first listener found is it.
fn try_ranges(asm: &mut Assembler, maps: &Maps) {
    try_range(asm);
    for index in 0..RANGES_I32 {
        lookup_range(asm, maps, index);
        try_range(asm);
    }
    asm.jump("unsteered");
}

fn try_range(asm: &mut Assembler) {
    asm.load(Word, R1, R0, RANGE_COUNTER);
    asm.store(Word, R10, COUNTER, R1);
    asm.alu(Op::Mov, R1, R6);
    asm.load(Word, R2, R0, RANGE_BASE);
    asm.load(Word, R3, R0, RANGE_COUNT);
    asm.load(Word, R4, R0, RANGE_STEP);
    asm.call_function("range");
    asm.jump_if_imm(Cond::Ne, R0, 0, "selected");
}

/// `range(ctx, base, count, step)`, `keys(ctx, base, count, start, tried)` and `key(ctx, base, count, start, tried)`: 0, or
/// one more than the key whose listener was selected. They try all keys of a range, 32 of them, and one.
fn functions(asm: &mut Assembler, maps: &Maps) -> Vec<Function> {
    let mut functions = vec![Function { name: "steer", offset: 0, numbers: 0 }];
    let mut begin = |asm: &mut Assembler, name, numbers| {
        functions.push(Function { name, offset: asm.offset(), numbers });
        asm.label(name);
    };
    begin(asm, "range", 3);
    keep_arguments(asm);
    asm.alu(Op::Mov, R9, R4);
    asm.load(Word, R0, R6, CTX_HASH);
    asm.jump_if_imm(Cond::Eq, R9, 0, "start");
    asm.call(HELPER_CPU);
    asm.alu(Op::Mul, R0, R9);
    asm.label("start");
    asm.store(Double, R10, START, R0);
    asm.alu_imm(Op::Mov, R9, 0);
    repeat(asm, "keys", 32, "range ends");

    begin(asm, "keys", 4);
    keep_arguments(asm);
    asm.store(Double, R10, START, R4);
    asm.alu(Op::Mov, R9, R5);
    repeat(asm, "key", 1, "keys end");

    begin(asm, "key", 4);
    asm.alu(Op::Mov, R6, R1);
    asm.alu(Op::Add, R4, R5);
    asm.alu(Op::Mod, R4, R3);
    asm.alu(Op::Add, R2, R4);
    asm.store(Word, R10, KEY, R2);
    select(asm, maps);
    asm.jump_if_imm(Cond::Ne, R0, 0, "nobody");
    asm.load(Word, R0, R10, KEY);
    asm.alu_imm(Op::Add, R0, 1);
    asm.exit();
    asm.label("nobody");
    asm.alu_imm(Op::Mov, R0, 0);
    asm.exit();
    functions
}

/// What a function that calls others was given and goes on giving: R6 = context, R7 = base, R8 = count.
fn keep_arguments(asm: &mut Assembler) {
    for (kept, argument) in [(R6, R1), (R7, R2), (R8, R3)] {
        asm.alu(Op::Mov, kept, argument);
    }
}

/// The rest of a function that calls another 32 times with `tried` (R9) growing by `step`, while the range has more keys.
fn repeat(asm: &mut Assembler, function: &'static str, step: i32, way_out: &'static str) {
    // What is returned if the range has no keys at all.
    asm.alu_imm(Op::Mov, R0, 0);
    for _ in 0..32 {
        asm.jump_if(Cond::Ge, R9, R8, way_out);
        for (argument, kept) in [(R1, R6), (R2, R7), (R3, R8), (R5, R9)] {
            asm.alu(Op::Mov, argument, kept);
        }
        asm.load(Double, R4, R10, START);
        asm.call_function(function);
        asm.jump_if_imm(Cond::Ne, R0, 0, way_out);
        asm.alu_imm(Op::Add, R9, step);
    }
    asm.label(way_out);
    asm.exit();
}

/// The ends of the program. R9 is the verdict from here on.
fn ends(asm: &mut Assembler, maps: &Maps) {
    let is_tcp = maps.flows.is_none();
    if is_tcp {
        asm.label("selected");
    }
    asm.label("found");
    asm.alu_imm(Op::Mov, R9, SK_PASS);
    asm.load(Word, R1, R10, COUNTER);
    asm.store(Word, R10, KEY, R1);
    lookup(asm, maps.counters, "exit");
    if is_tcp {
        asm.load(Double, R1, R6, CTX_MIGRATING);
        asm.jump_if_imm(Cond::Eq, R1, 0, "count");
        asm.alu_imm(Op::Add, R0, 8);
    }
    asm.label("count");
    count(asm);
    asm.label("exit");
    asm.alu(Op::Mov, R0, R9);
    asm.exit();

    asm.label("unsteered");
    asm.alu_imm(Op::Mov, R9, SK_PASS);
    asm.store_imm(Word, R10, KEY, COUNTER_GROUP.cast_signed());
    lookup(asm, maps.counters, "exit");
    asm.alu_imm(Op::Add, R0, 8);
    asm.jump("count");

    asm.label("closed");
    if is_tcp {
        // What has begun may still move to a listener that is open: the kernel chooses one.
        asm.load(Double, R1, R6, CTX_MIGRATING);
        asm.jump_if_imm(Cond::Ne, R1, 0, "unsteered");
    }
    asm.alu_imm(Op::Mov, R9, SK_DROP);
    asm.store_imm(Word, R10, KEY, COUNTER_GROUP.cast_signed());
    lookup(asm, maps.counters, "exit");
    asm.jump("count");
}

pub mod flows;

// An interpreter in an interpreter takes hours.
#[cfg(test)]
#[cfg(not(miri))]
mod tests;
