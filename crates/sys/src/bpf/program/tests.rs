//! The very instructions that are loaded, run by an interpreter with the kernel's helpers and maps played here.
//!
//! The interpreter knows no atomic add, so that instruction becomes a call; everything else is untouched.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use super::flows::{FLOW_BYTES, OWNER_BYTES, TIMEOUT_ENTRY, VALUE_BYTES};
use super::*;
use crate::bpf::asm::ATOMIC_ADD;
use crate::bpf::steering::{Plan, Probe, Range, encode_plan, encode_probe};

mod flows;

const MAPS: Maps = Maps { sockets: 1, plans: 2, control: 3, counters: 4, probes: 5, flows: None };
/// The flow table, which is no array.
const FLOWS: u64 = 0;
const OWNERS: usize = 6;
const HELPER_ATOMIC_ADD: u32 = 1000;

/// The kernel as the program sees it: records per map, listeners, and what the program did.
#[derive(Default)]
struct World {
    records: [Vec<Vec<u8>>; 7],
    /// UDP: entries of the flow table that count, and the flows.
    table: Option<u32>,
    flows: BTreeMap<[u8; FLOW_BYTES], Vec<u8>>,
    listeners: BTreeSet<u32>,
    tried: Vec<u32>,
    random: u32,
    cpu: u32,
    time: u64,
    net_header: Vec<u8>,
}

thread_local! {
    static WORLD: RefCell<World> = RefCell::default();
}

fn key_at(address: u64) -> u32 {
    // SAFETY: the program passes the address of an initialised word on its stack.
    unsafe { (address as *const u32).read_unaligned() }
}

fn bytes_at<const N: usize>(address: u64) -> [u8; N] {
    // SAFETY: the program passes the address of so many initialised bytes on its stack.
    unsafe { (address as *const [u8; N]).read_unaligned() }
}

fn map_lookup(map: u64, key: u64, _: u64, _: u64, _: u64) -> u64 {
    WORLD.with_borrow(|world| {
        let record = match usize::try_from(map).unwrap() {
            0 => world.flows.get(&bytes_at(key)),
            array => world.records[array].get(key_at(key) as usize),
        };
        record.map_or(0, |record| record.as_ptr() as u64)
    })
}

fn map_update(map: u64, key: u64, value: u64, _: u64, _: u64) -> u64 {
    assert_eq!(map, FLOWS);
    let (key, value) = (bytes_at(key), bytes_at::<VALUE_BYTES>(value));
    WORLD.with_borrow_mut(|world| world.flows.insert(key, value.to_vec()));
    0
}

fn cpu(_: u64, _: u64, _: u64, _: u64, _: u64) -> u64 {
    WORLD.with_borrow(|world| world.cpu.into())
}

fn time(_: u64, _: u64, _: u64, _: u64, _: u64) -> u64 {
    WORLD.with_borrow(|world| world.time)
}

fn random(_: u64, _: u64, _: u64, _: u64, _: u64) -> u64 {
    WORLD.with_borrow(|world| u64::from(world.random))
}

fn select_socket(_: u64, _: u64, key: u64, _: u64, _: u64) -> u64 {
    WORLD.with_borrow_mut(|world| {
        let key = key_at(key);
        world.tried.push(key);
        if world.listeners.contains(&key) { 0 } else { 2_i64.wrapping_neg().cast_unsigned() }
    })
}

fn load_bytes(_: u64, offset: u64, to: u64, length: u64, _: u64) -> u64 {
    WORLD.with_borrow(|world| {
        let at = usize::try_from(offset).unwrap();
        let length = usize::try_from(length).unwrap();
        let Some(bytes) = world.net_header.get(at..at + length) else { return u64::MAX };
        // SAFETY: the program passes the address and length of a buffer on its stack.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to as *mut u8, length) };
        0
    })
}

fn atomic_add(address: u64, _: u64, _: u64, _: u64, _: u64) -> u64 {
    let counter = address as *mut u64;
    // SAFETY: the program passes the address of a counter in a record that this test owns.
    unsafe { counter.write_unaligned(counter.read_unaligned() + 1) };
    0
}

/// One packet (or migration) as the context describes it.
struct Packet {
    hash: u32,
    is_migration: bool,
    ipv6: bool,
    tcp_header: Vec<u8>,
}

impl Packet {
    fn new(hash: u32, is_migration: bool) -> Packet {
        Packet { hash, is_migration, ipv6: false, tcp_header: vec![0; 20] }
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    verdict: u64,
    tried: Vec<u32>,
    /// Counter record and word that went up.
    counted: Vec<(u32, u32)>,
}

fn instructions(table: Option<u32>) -> Vec<u8> {
    let flows = table.map(|table| FlowMaps { flows: 0, table, owners: 6 });
    let mut insns = build(&Maps { flows, ..MAPS }).unwrap().insns;
    let adds: Vec<usize> = (0..insns.len()).filter(|&at| insns[at].code == ATOMIC_ADD).collect();
    assert_eq!(adds.len(), if table.is_some() { 4 } else { 1 });
    let mut call = Assembler::new();
    call.alu(Op::Mov, R1, R0);
    call.call(HELPER_ATOMIC_ADD.cast_signed());
    let call = call.finish().unwrap();
    adds.iter().for_each(|add| insns[add - 1..=*add].copy_from_slice(&call));
    insns.iter().flat_map(|insn| insn.bytes()).collect()
}

/// A world with one plan in force and listeners under these keys.
fn world(plan: &Plan, listeners: impl IntoIterator<Item = u32>) {
    let mut records: [Vec<Vec<u8>>; 7] = Default::default();
    records[2] = vec![vec![0xee; RANGE_BYTES]; RANGES];
    records[2].extend(encode_plan(plan).unwrap().map(|range| range.to_vec()));
    records[3] = vec![1_u32.to_ne_bytes().to_vec(), vec![0; 4]];
    records[4] = vec![vec![0; COUNTER_BYTES]; 67];
    records[5] = vec![vec![0; PROBE_BYTES]; 3];
    let listeners = listeners.into_iter().collect();
    WORLD.set(World { records, listeners, ..World::default() });
}

fn run(packet: &Packet) -> Outcome {
    let program = instructions(WORLD.with_borrow(|world| world.table));
    let mut vm = rbpf::EbpfVmRaw::new(Some(&program)).unwrap();
    // No function's frame is larger; the interpreter's default would not fit four of them.
    vm.set_stack_usage_calculator(|_, _, _| 96, Box::new(())).unwrap();
    let helpers: [(i32, rbpf::Helper); 7] = [
        (HELPER_MAP_LOOKUP, map_lookup),
        (super::flows::HELPER_MAP_UPDATE, map_update),
        (super::flows::HELPER_TIME, time),
        (HELPER_RANDOM, random),
        (HELPER_CPU, cpu),
        (HELPER_SELECT, select_socket),
        (HELPER_LOAD_BYTES_RELATIVE, load_bytes),
    ];
    for (number, helper) in helpers {
        vm.register_helper(number.cast_unsigned(), helper).unwrap();
    }
    vm.register_helper(HELPER_ATOMIC_ADD, atomic_add).unwrap();
    let mut ranges = vec![packet.tcp_header.as_ptr_range()];
    WORLD.with_borrow_mut(|world| {
        world.tried.clear();
        // All but the window, which is no counter.
        world.records[4][..COUNTER_WINDOW as usize].iter_mut().for_each(|record| record.fill(0));
        let records = world.records.iter().flatten().chain(world.flows.values());
        ranges.extend(records.map(|record| record.as_ptr_range()));
    });
    for range in ranges {
        vm.register_allowed_memory(range.start as u64..range.end as u64);
    }
    let mut context = [0; 56];
    let tcp = packet.tcp_header.as_ptr_range();
    context[0..8].copy_from_slice(&(tcp.start as u64).to_ne_bytes());
    context[8..16].copy_from_slice(&(tcp.end as u64).to_ne_bytes());
    context[20..24].copy_from_slice(&eth_protocol(packet.ipv6).to_ne_bytes());
    context[32..36].copy_from_slice(&packet.hash.to_ne_bytes());
    context[48..56].copy_from_slice(&u64::from(packet.is_migration).to_ne_bytes());
    let verdict = vm.execute_program(&mut context).unwrap();
    WORLD.with_borrow_mut(|world| {
        let mut counted = Vec::new();
        for (slot, record) in (0..COUNTER_WINDOW).zip(&world.records[4]) {
            counted.extend((0..2).filter(|&word| record[word as usize * 8] != 0).map(|word| (slot, word)));
        }
        Outcome { verdict, tried: std::mem::take(&mut world.tried), counted }
    })
}

/// The same decisions in plain words. `random` is what the weights are drawn by.
fn model(
    plan: &Plan,
    listeners: &BTreeSet<u32>,
    (hash, cpu): (u32, u32),
    random: u32,
    is_migration: bool,
) -> Outcome {
    let word = u32::from(is_migration);
    if plan.ranges.is_empty() {
        return Outcome { verdict: word.into(), tried: vec![], counted: vec![(COUNTER_GROUP, word)] };
    }
    let last = plan.ranges.len() - 1;
    let first = plan.ranges[..last].iter().position(|range| random < range.weight_below).unwrap_or(last);
    let mut tried = Vec::new();
    for range in std::iter::once(first).chain(0..=last).map(|index| plan.ranges[index]) {
        let start = if range.step == 0 { hash } else { cpu * range.step };
        for key in (0..range.count).map(|n| range.base + (start % range.count + n) % range.count) {
            tried.push(key);
            if listeners.contains(&key) {
                return Outcome { verdict: 1, tried, counted: vec![(range.counter, word)] };
            }
        }
    }
    Outcome { verdict: 1, tried, counted: vec![(COUNTER_GROUP, 1)] }
}

/// Numbers that look random and are the same in each run.
fn numbers() -> impl FnMut(u32) -> u32 {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    move |below| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        u32::try_from((state >> 32) % u64::from(below)).unwrap()
    }
}

fn any_plan(number: &mut impl FnMut(u32) -> u32) -> Plan {
    let ranges = number(5);
    let mut range = |index| Range {
        weight_below: number(u32::MAX),
        base: index * 100,
        count: number(12),
        counter: number(64),
        step: number(2) * number(5),
    };
    Plan { ranges: (0..ranges).map(&mut range).collect() }
}

#[test]
fn any_plan_steers_as_the_model_says() {
    let mut number = numbers();
    for case in 0..3000 {
        let plan = any_plan(&mut number);
        let density = number(4);
        let listeners: BTreeSet<u32> = (0..500).filter(|_| number(4) < density).collect();
        world(&plan, listeners.iter().copied());
        let (hash, random, is_migration) = (number(u32::MAX), number(u32::MAX), number(2) == 1);
        let cpu = number(8192);
        WORLD.with_borrow_mut(|world| (world.random, world.cpu) = (random, cpu));
        let outcome = run(&Packet::new(hash, is_migration));
        let wanted = model(&plan, &listeners, (hash, cpu), random, is_migration);
        assert_eq!(outcome, wanted, "case {case}: {plan:?}");
    }
}

#[test]
fn every_key_of_the_largest_plan_is_tried() {
    let range = |base, count| Range { weight_below: 0, base, count, counter: 1, step: 0 };
    let plan = Plan { ranges: vec![range(0, 1024), range(5000, 1024), range(7000, 0), range(3000, 1024)] };
    let listeners = BTreeSet::from([3076]);
    world(&plan, listeners.iter().copied());
    let outcome = run(&Packet::new(77, false));
    assert_eq!(outcome, model(&plan, &listeners, (77, 0), 0, false));
    assert_eq!(outcome.counted, [(1, 0)]);
}

#[test]
fn a_selector_beyond_the_records_leaves_the_choice_to_the_kernel() {
    world(&Plan::default(), []);
    WORLD.with_borrow_mut(|world| world.records[3][0] = 9_u32.to_ne_bytes().to_vec());
    let outcome = run(&Packet::new(1, false));
    assert_eq!(outcome, Outcome { verdict: 1, tried: vec![], counted: vec![(COUNTER_GROUP, 1)] });
}

/// A plan with key 0, a listener under key 7, and a probe for it from `remote` in force.
fn probed_world(remote: &str) {
    let range = Range { weight_below: 0, base: 0, count: 1, counter: 3, step: 0 };
    world(&Plan { ranges: vec![range] }, [0, 7]);
    let probe = Probe { remote: remote.parse().unwrap(), key: 7 };
    WORLD.with_borrow_mut(|world| {
        world.records[5][2] = encode_probe(&probe).to_vec();
        world.records[3][1] = 2_u32.to_ne_bytes().to_vec();
    });
}

/// The SYN that `source` would send.
fn syn(source: &str) -> Packet {
    let source: SocketAddr = source.parse().unwrap();
    let mut tcp_header = vec![0; 20];
    tcp_header[..2].copy_from_slice(&source.port().to_be_bytes());
    let mut header = vec![0xaa; 40];
    match source.ip() {
        std::net::IpAddr::V4(ip) => header[12..16].copy_from_slice(&ip.octets()),
        std::net::IpAddr::V6(ip) => header[8..24].copy_from_slice(&ip.octets()),
    }
    WORLD.with_borrow_mut(|world| world.net_header = header);
    Packet { hash: 0, is_migration: false, ipv6: source.is_ipv6(), tcp_header }
}

#[test]
fn only_the_probe_reaches_the_probed_listener() {
    let cases = [
        ("10.1.2.3:4000", "10.1.2.3:4000", 7),
        ("10.1.2.3:4000", "10.1.2.3:4001", 0),
        ("10.1.2.3:4000", "10.1.2.4:4000", 0),
        ("10.1.2.3:4000", "[a01:203::]:4000", 0),
        ("[::ffff:10.1.2.3]:4000", "10.1.2.3:4000", 7),
        ("[fe80::1:2]:9", "[fe80::1:2]:9", 7),
        ("[fe80::1:2]:9", "[fe80::1:3]:9", 0),
        ("[fe80::1:2]:9", "[fe81::1:2]:9", 0),
    ];
    for (remote, source, key) in cases {
        probed_world(remote);
        let outcome = run(&syn(source));
        assert_eq!((outcome.verdict, outcome.tried), (1, vec![key]), "probe {remote}, packet from {source}");
        let counted = if key == 7 { vec![] } else { vec![(3, 0)] };
        assert_eq!(outcome.counted, counted, "a probe is nobody's connection");
    }
}

#[test]
fn a_probe_never_costs_a_client() {
    probed_world("10.1.2.3:4000");
    let moved = Packet { is_migration: true, ..syn("10.1.2.3:4000") };
    assert_eq!(run(&moved).tried, [0], "a migration's packet is not looked at");
    let cut = Packet { tcp_header: vec![0x0f, 0xa0, 0], ..syn("10.1.2.3:4000") };
    assert_eq!(run(&cut).tried, [0], "a packet without a whole header");
    WORLD.with_borrow_mut(|world| world.net_header.clear());
    let unreadable = Packet { ipv6: false, ..syn("10.1.2.3:4000") };
    WORLD.with_borrow_mut(|world| world.net_header.clear());
    assert_eq!(run(&unreadable).tried, [0], "a packet whose address can't be read");
    WORLD.with_borrow_mut(|world| world.listeners.remove(&7));
    assert_eq!(run(&syn("10.1.2.3:4000")).tried, [7, 0], "the probed listener has gone");
}
