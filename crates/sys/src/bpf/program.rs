//! The `sk_reuseport` program: which listener of a group gets a connection.
//!
//! In C it would read:
//!
//! ```c
//! int steer(struct sk_reuseport_md *ctx) {
//!     if (!ctx->migrating_sk && probes[control[PROBE]] matches the SYN's source
//!         && select(ctx, sockets, probe->key) == 0)
//!         return SK_PASS;
//!     plan = plans[control[PLAN]];
//!     if (plan->ranges == 0)                       // stopping: new ones are refused, begun ones may move
//!         return ctx->migrating_sk ? SK_PASS : SK_DROP;
//!     first = weighted random range;
//!     for (range in first, then all others in order)
//!         for (key in range, starting at hash % count, wrapping around)
//!             if (select(ctx, sockets, key) == 0) { count(range->counter); return SK_PASS; }
//!     count(unsteered);
//!     return SK_PASS;                              // nobody there: the kernel's own hash decides
//! }
//! ```
//!
//! The verifier walks every iteration, so the loop is written to cost it little: no state is carried from one
//! range to the next, and within a range only the number of keys tried is known to it.

use super::asm::{AsmError, Assembler, Cond, Insn, Op, Reg, Size};
use Reg::{R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10};
use Size::{Double, Half, Word};

/// Keys a range may have: the bound that lets the verifier follow the loop to its end.
pub const RANGE_KEYS_MAX: i32 = 1024;
/// Ranges in a plan record. A power of two, because indices are masked.
pub const RANGES: usize = 4;
/// Entry of the control map that names the plan record in force.
pub const CONTROL_PLAN: u32 = 0;
/// Entry of the control map that names the probe record in force; 0 is none.
pub const CONTROL_PROBE: u32 = 1;
/// Counter record for the group as a whole: first word refused, second word unsteered.
pub const COUNTER_GROUP: u32 = 64;

/// Bytes of a plan record: number of ranges, one zero word, then per range weight, base, count, counter.
pub const PLAN_BYTES: usize = 8 + RANGES * RANGE_BYTES;
/// Bytes of one range in a plan record.
pub const RANGE_BYTES: usize = 16;
/// Bytes of a probe record: protocol, port, address (16), key, padding.
pub const PROBE_BYTES: usize = 32;
/// Bytes of a counter record: two u64.
pub const COUNTER_BYTES: usize = 16;

const RANGES_I32: i32 = 4;
const RANGE_STRIDE: i16 = 16;
const RANGE_SHIFT: i32 = 4;

const PLAN_RANGE_COUNT: i16 = 0;
const PLAN_ZERO: i16 = 4;
const PLAN_RANGES: i16 = 8;
const RANGE_WEIGHT: i16 = PLAN_RANGES;
const RANGE_BASE: i16 = PLAN_RANGES + 4;
const RANGE_COUNT: i16 = PLAN_RANGES + 8;
const RANGE_COUNTER: i16 = PLAN_RANGES + 12;

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
const HELPER_LOAD_BYTES_RELATIVE: i32 = 68;
const HELPER_SELECT: i32 = 82;
const HEADER_START_NET: i32 = 1;
const SK_DROP: i32 = 0;
const SK_PASS: i32 = 1;

// The stack frame.
const KEY: i16 = -4;
const BASE: i16 = -8;
const COUNT: i16 = -12;
const COUNTER: i16 = -16;
const FIRST: i16 = -20;
const ADDRESS: i16 = -40;

/// The program's maps, as descriptors of this process.
#[derive(Clone, Copy, Debug)]
pub struct Maps {
    /// REUSEPORT_SOCKARRAY of admitted listeners.
    pub sockets: i32,
    /// ARRAY of plan records.
    pub plans: i32,
    /// ARRAY of u32: which records are in force.
    pub control: i32,
    /// ARRAY of counter records.
    pub counters: i32,
    /// ARRAY of probe records.
    pub probes: i32,
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
pub fn build(maps: &Maps) -> Result<Vec<Insn>, AsmError> {
    let mut asm = Assembler::new();
    asm.alu(Op::Mov, R6, R1);
    probe(&mut asm, maps);
    choose_range(&mut asm, maps);
    try_keys(&mut asm, maps);
    ends(&mut asm, maps);
    asm.finish()
}

/// R0 = address of `map[key on the stack]`; goes to `missing` when there is none.
fn lookup(asm: &mut Assembler, map: i32, missing: &'static str) {
    asm.load_map(R1, map);
    asm.alu(Op::Mov, R2, R10);
    asm.alu_imm(Op::Add, R2, i32::from(KEY));
    asm.call(HELPER_MAP_LOOKUP);
    asm.jump_if_imm(Cond::Eq, R0, 0, missing);
}

/// R0 = result of selecting the socket under the key on the stack.
fn select(asm: &mut Assembler, maps: &Maps) {
    asm.alu(Op::Mov, R1, R6);
    asm.load_map(R2, maps.sockets);
    asm.alu(Op::Mov, R3, R10);
    asm.alu_imm(Op::Add, R3, i32::from(KEY));
    asm.alu_imm(Op::Mov, R4, 0);
    asm.call(HELPER_SELECT);
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
    // The context's data starts at the TCP header.
    asm.load(Double, R1, R6, CTX_DATA);
    asm.load(Double, R2, R6, CTX_DATA_END);
    asm.alu(Op::Mov, R3, R1);
    asm.alu_imm(Op::Add, R3, 4);
    asm.jump_if(Cond::Gt, R3, R2, "plan");
    asm.load(Half, R1, R1, 0);
    asm.load(Word, R2, R8, PROBE_PORT);
    asm.jump_if(Cond::Ne, R1, R2, "plan");
    asm.store_imm(Double, R10, ADDRESS, 0);
    asm.store_imm(Double, R10, ADDRESS + 8, 0);
    asm.alu(Op::Mov, R1, R6);
    asm.alu(Op::Mov, R3, R10);
    asm.alu_imm(Op::Add, R3, i32::from(ADDRESS));
    asm.alu_imm(Op::Mov, R5, HEADER_START_NET);
    asm.jump_if_imm(Cond::Eq, R9, eth_protocol(true).cast_signed(), "ipv6");
    asm.alu_imm(Op::Mov, R2, 12);
    asm.alu_imm(Op::Mov, R4, 4);
    asm.call(HELPER_LOAD_BYTES_RELATIVE);
    asm.jump("loaded");
    asm.label("ipv6");
    asm.alu_imm(Op::Mov, R2, 8);
    asm.alu_imm(Op::Mov, R4, 16);
    asm.call(HELPER_LOAD_BYTES_RELATIVE);
    asm.label("loaded");
    asm.jump_if_imm(Cond::Ne, R0, 0, "plan");
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

/// R7 = plan record in force, R1 = index of the range chosen by weight.
fn choose_range(asm: &mut Assembler, maps: &Maps) {
    asm.label("plan");
    asm.store_imm(Word, R10, KEY, CONTROL_PLAN.cast_signed());
    lookup(asm, maps.control, "unsteered");
    asm.load(Word, R1, R0, 0);
    asm.store(Word, R10, KEY, R1);
    lookup(asm, maps.plans, "unsteered");
    asm.alu(Op::Mov, R7, R0);
    asm.load(Word, R8, R7, PLAN_RANGE_COUNT);
    asm.jump_if_imm(Cond::Eq, R8, 0, "closed");
    asm.alu_imm(Op::Mov, R9, 0);
    asm.jump_if_imm(Cond::Lt, R8, 2, "chosen");
    asm.call(HELPER_RANDOM);
    let mut weight = RANGE_WEIGHT;
    for index in 1..RANGES_I32 {
        asm.load(Word, R1, R7, weight);
        asm.jump_if(Cond::Lt, R0, R1, "chosen");
        asm.alu_imm(Op::Mov, R9, index);
        asm.jump_if_imm(Cond::Lt, R8, index + 2, "chosen");
        weight += RANGE_STRIDE;
    }
    asm.label("chosen");
    // Adding a zero the verifier cannot see through makes the index unknown: one state, not four.
    asm.load(Word, R1, R7, PLAN_ZERO);
    asm.alu(Op::Add, R1, R9);
    asm.alu_imm(Op::And, R1, RANGES_I32 - 1);
}

/// Tries keys until one holds a listener: the range in R1 first, then the others in order.
///
/// R8 = index of the next range, R9 = keys tried of the present one: both in registers, where every verifier
/// follows their values. Each branch has the way out fall through, because that is followed first.
fn try_keys(asm: &mut Assembler, maps: &Maps) {
    asm.store(Word, R10, FIRST, R1);
    asm.alu_imm(Op::Mov, R8, 0);
    enter_range(asm);

    asm.label("loop");
    asm.jump_if_imm(Cond::Eq, R9, RANGE_KEYS_MAX, "next range");
    asm.load(Word, R1, R10, COUNT);
    asm.jump_if(Cond::Lt, R9, R1, "try");

    asm.label("next range");
    asm.jump_if_imm(Cond::Eq, R8, RANGES_I32, "unsteered");
    asm.load(Word, R1, R7, PLAN_RANGE_COUNT);
    asm.jump_if(Cond::Lt, R8, R1, "other");
    asm.jump("unsteered");
    asm.label("other");
    asm.alu(Op::Mov, R1, R8);
    asm.alu_imm(Op::Add, R8, 1);
    asm.load(Word, R2, R10, FIRST);
    asm.jump_if(Cond::Eq, R1, R2, "next range");
    asm.jump("enter");

    asm.label("try");
    asm.load(Word, R2, R6, CTX_HASH);
    asm.alu(Op::Add, R2, R9);
    asm.alu(Op::Mod, R2, R1);
    asm.load(Word, R1, R10, BASE);
    asm.alu(Op::Add, R2, R1);
    asm.store(Word, R10, KEY, R2);
    asm.alu_imm(Op::Add, R9, 1);
    select(asm, maps);
    asm.jump_if_imm(Cond::Ne, R0, 0, "loop");
    asm.jump("found");
}

/// Makes the range with index R1 the one whose keys are tried.
fn enter_range(asm: &mut Assembler) {
    asm.label("enter");
    asm.alu_imm(Op::Shl, R1, RANGE_SHIFT);
    asm.alu(Op::Add, R1, R7);
    for (field, slot) in [(RANGE_BASE, BASE), (RANGE_COUNT, COUNT), (RANGE_COUNTER, COUNTER)] {
        asm.load(Word, R2, R1, field);
        asm.store(Word, R10, slot, R2);
    }
    asm.alu_imm(Op::Mov, R9, 0);
}

/// The ends of the program. R9 is the verdict from here on.
fn ends(asm: &mut Assembler, maps: &Maps) {
    asm.label("found");
    asm.alu_imm(Op::Mov, R9, SK_PASS);
    asm.load(Word, R1, R10, COUNTER);
    asm.store(Word, R10, KEY, R1);
    lookup(asm, maps.counters, "exit");
    asm.load(Double, R1, R6, CTX_MIGRATING);
    asm.jump_if_imm(Cond::Eq, R1, 0, "count");
    asm.label("count second");
    asm.alu_imm(Op::Add, R0, 8);
    asm.label("count");
    asm.alu_imm(Op::Mov, R1, 1);
    asm.atomic_add(R0, 0, R1);
    asm.label("exit");
    asm.alu(Op::Mov, R0, R9);
    asm.exit();

    asm.label("unsteered");
    asm.alu_imm(Op::Mov, R9, SK_PASS);
    asm.store_imm(Word, R10, KEY, COUNTER_GROUP.cast_signed());
    lookup(asm, maps.counters, "exit");
    asm.jump("count second");

    asm.label("closed");
    // What has begun may still move to a listener that is open: the kernel chooses one.
    asm.load(Double, R1, R6, CTX_MIGRATING);
    asm.jump_if_imm(Cond::Ne, R1, 0, "unsteered");
    asm.alu_imm(Op::Mov, R9, SK_DROP);
    asm.store_imm(Word, R10, KEY, COUNTER_GROUP.cast_signed());
    lookup(asm, maps.counters, "exit");
    asm.jump("count");
}

#[cfg(test)]
mod tests;
