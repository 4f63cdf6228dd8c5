//! UDP: a flow is all that comes from one remote address and port to one local address, and stays with its listener.
//!
//! In C it would read:
//!
//! ```c
//! int steer(struct sk_reuseport_md *ctx) {
//!     ranges = &plans[control[PLAN] * RANGES];
//!     first = the first range with (u32)(hash * MIX) < range->weight;      // a flow's range is always the same
//!     if (none)
//!         return SK_DROP;
//!     timeout = owners[0].last;                                    // the owner of key k is owners[k + 1]
//!     if (timeout) {
//!         now = bpf_ktime_get_ns();
//!         known = lookup(flows, {addresses, port, protocol});
//!         if (known && now <= known->last + timeout && owners[known->key + 1].generation == known->generation
//!             && select(ctx, sockets, known->key) == 0) {
//!             known->last = owners[known->key + 1].last = now;
//!             return SK_PASS;
//!         }
//!     }
//!     ...                                          // a key is searched for as for TCP, and counted when it is found
//!     if (timeout) {
//!         flows[...] = {key, owners[key + 1].generation, now};
//!         owners[key + 1].last = now;
//!         begun++;
//!         if (!known) {                            // a new entry, for which another one had to go if all are taken
//!             if (now > window.start + timeout)
//!                 window = {now, 0};
//!             if (window.number++ >= table)        // what went was begun in this window too: not idle yet
//!                 overflow++;
//!         }
//!     }
//!     return SK_PASS;
//! }
//! ```

use super::*;

/// Bytes that name a flow: remote and local address (of IPv4 4 each, then zeroes), port, protocol.
pub const FLOW_BYTES: usize = 40;
/// Bytes of a flow record: key, generation, time of the last datagram (u64).
pub const VALUE_BYTES: usize = 16;
/// Bytes of an owner record: generation, padding, time of the last datagram (u64).
pub const OWNER_BYTES: usize = 16;
/// Entry of the owners map whose time is the timeout; the one of key k is k + 1.
pub const TIMEOUT_ENTRY: u32 = 0;

const OWNER_GENERATION: i16 = 0;
const LAST: i16 = 8;

pub(super) const HELPER_MAP_UPDATE: i32 = 2;
pub(super) const HELPER_TIME: i32 = 5;

// More of the stack frame.
const TIMEOUT: i16 = -16;
const NOW: i16 = -24;
const IS_KNOWN: i16 = -32;
const FLOW: i16 = -72;
const FLOW_PORT: i16 = FLOW + 32;
const FLOW_PROTOCOL: i16 = FLOW + 36;
const VALUE: i16 = -88;
const VALUE_GENERATION: i16 = VALUE + 4;

/// 2^32 divided by the golden ratio. The hash itself chooses within the range; multiplied by this, its order says
/// nothing about its remainders.
pub(super) const MIX: i32 = 0x9e37_79b1_u32.cast_signed();

/// R7 = a number below 2^32 that is always the same for a flow.
pub(super) fn draw(asm: &mut Assembler) {
    asm.load(Word, R7, R6, CTX_HASH);
    asm.alu_imm(Op::Mul, R7, MIX);
    asm.alu_imm(Op::Shl, R7, 32);
    asm.alu_imm(Op::Shr, R7, 32);
}

/// A datagram of a known flow goes where the last one went. R0 is the record of the chosen range, before and after.
pub(super) fn go_on(asm: &mut Assembler, maps: &Maps, table: &FlowMaps) {
    asm.alu(Op::Mov, R7, R0);
    identify(asm, table);
    asm.call(HELPER_TIME);
    asm.store(Double, R10, NOW, R0);
    lookup_at(asm, table.flows, FLOW, "choose");
    asm.alu(Op::Mov, R9, R0);
    asm.store_imm(Word, R10, IS_KNOWN, 1);
    // Another processor may have set a time later than ours: no subtraction.
    asm.load(Double, R1, R9, LAST);
    asm.load(Double, R2, R10, TIMEOUT);
    asm.alu(Op::Add, R1, R2);
    asm.load(Double, R2, R10, NOW);
    asm.jump_if(Cond::Gt, R2, R1, "choose");
    // In one go: the record may be given to another flow at any time.
    asm.load(Double, R1, R9, 0);
    asm.store(Double, R10, VALUE, R1);
    owner_of_value(asm, table);
    asm.load(Word, R1, R0, OWNER_GENERATION);
    asm.load(Word, R2, R10, VALUE_GENERATION);
    asm.jump_if(Cond::Ne, R1, R2, "choose");
    asm.load(Word, R1, R10, VALUE);
    asm.store(Word, R10, KEY, R1);
    select(asm, maps);
    asm.jump_if_imm(Cond::Ne, R0, 0, "choose");
    owner_of_value(asm, table);
    asm.load(Double, R1, R10, NOW);
    asm.store(Double, R9, LAST, R1);
    asm.store(Double, R0, LAST, R1);
    asm.alu_imm(Op::Mov, R0, SK_PASS);
    asm.exit();
    asm.label("choose");
    asm.alu(Op::Mov, R0, R7);
}

/// R0 = owner record of the key in VALUE.
fn owner_of_value(asm: &mut Assembler, table: &FlowMaps) {
    asm.load(Word, R1, R10, VALUE);
    asm.alu_imm(Op::Add, R1, 1);
    asm.store(Word, R10, KEY, R1);
    lookup(asm, table.owners, "choose");
}

/// Writes down which flow it is, and the timeout last: as long as that is 0 no flow is kept.
fn identify(asm: &mut Assembler, table: &FlowMaps) {
    for place in (FLOW..=TIMEOUT).step_by(8) {
        asm.store_imm(Double, R10, place, 0);
    }
    asm.store_imm(Word, R10, KEY, TIMEOUT_ENTRY.cast_signed());
    lookup(asm, table.owners, "choose");
    asm.load(Double, R9, R0, LAST);
    asm.jump_if_imm(Cond::Eq, R9, 0, "choose");
    load_source_port(asm, "choose");
    asm.store(Word, R10, FLOW_PORT, R1);
    asm.load(Word, R0, R6, CTX_ETH_PROTOCOL);
    asm.store(Word, R10, FLOW_PROTOCOL, R0);
    load_addresses(asm, R0, FLOW, 2, "choose");
    asm.store(Double, R10, TIMEOUT, R9);
}

/// Remembers the flow. R0 is one more than the key that was found.
pub(super) fn begin(asm: &mut Assembler, maps: &Maps, table: &FlowMaps) {
    asm.label("selected");
    asm.alu(Op::Mov, R7, R0);
    asm.load(Double, R8, R10, TIMEOUT);
    asm.jump_if_imm(Cond::Eq, R8, 0, "found");
    asm.store(Word, R10, KEY, R7);
    lookup(asm, table.owners, "found");
    asm.load(Word, R1, R0, OWNER_GENERATION);
    asm.store(Word, R10, VALUE_GENERATION, R1);
    asm.alu_imm(Op::Add, R7, -1);
    asm.store(Word, R10, VALUE, R7);
    asm.load(Double, R1, R10, NOW);
    asm.store(Double, R10, VALUE + LAST, R1);
    asm.store(Double, R0, LAST, R1);
    asm.load_map(R1, table.flows);
    stack_address(asm, R2, FLOW);
    stack_address(asm, R3, VALUE);
    asm.alu_imm(Op::Mov, R4, 0);
    asm.call(HELPER_MAP_UPDATE);

    asm.store_imm(Word, R10, KEY, COUNTER_FLOWS.cast_signed());
    lookup(asm, maps.counters, "found");
    count(asm);
    asm.load(Word, R1, R10, IS_KNOWN);
    asm.jump_if_imm(Cond::Ne, R1, 0, "found");
    asm.store_imm(Word, R10, KEY, COUNTER_WINDOW.cast_signed());
    lookup(asm, maps.counters, "found");
    asm.alu(Op::Mov, R9, R0);
    asm.load(Double, R1, R9, 0);
    asm.alu(Op::Add, R1, R8);
    asm.load(Double, R2, R10, NOW);
    asm.jump_if(Cond::Ge, R1, R2, "in window");
    // Processors that come here at once may lose each other's first entries: a few.
    asm.store(Double, R9, 0, R2);
    asm.store_imm(Double, R9, 8, 0);
    asm.label("in window");
    asm.load(Double, R7, R9, 8);
    asm.alu(Op::Mov, R0, R9);
    asm.alu_imm(Op::Add, R0, 8);
    count(asm);
    asm.jump_if_imm(Cond::Lt, R7, table.table.cast_signed(), "found");
    asm.store_imm(Word, R10, KEY, COUNTER_FLOWS.cast_signed());
    lookup(asm, maps.counters, "found");
    asm.alu_imm(Op::Add, R0, 8);
    count(asm);
}
