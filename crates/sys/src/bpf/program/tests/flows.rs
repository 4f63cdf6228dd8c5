//! The program for UDP.

use super::*;
use crate::bpf::program::flows::MIX;

/// Flows in plain words: key, generation, time of the last datagram.
#[derive(Default)]
struct Model {
    flows: BTreeMap<u16, (u32, u32, u64)>,
    window: (u64, u64),
}

const KEYS: u32 = 500;

fn owner(generation: u32, last: u64) -> Vec<u8> {
    let mut record = vec![0; OWNER_BYTES];
    record[..4].copy_from_slice(&generation.to_ne_bytes());
    record[8..].copy_from_slice(&last.to_ne_bytes());
    record
}

fn last_at(place: u32) -> u64 {
    WORLD
        .with_borrow(|world| u64::from_ne_bytes(*world.records[OWNERS][place as usize].last_chunk().unwrap()))
}

fn set_time(now: u64) {
    WORLD.with_borrow_mut(|world| world.time = now);
}

fn set_owner(place: u32, generation: u32, last: u64) {
    WORLD.with_borrow_mut(|world| world.records[OWNERS][place as usize] = owner(generation, last));
}

fn datagram_world(plan: &Plan, listeners: impl IntoIterator<Item = u32>, table: u32) {
    world(plan, listeners);
    WORLD.with_borrow_mut(|world| {
        world.table = Some(table);
        world.records[OWNERS] = vec![owner(0, 0); KEYS as usize + 1];
    });
}

fn datagram(hash: u32, port: u16) -> Packet {
    Packet { hash, ..syn(&format!("10.1.2.3:{port}")) }
}

impl Model {
    /// What becomes of a datagram, and what is remembered then. `generations` are the owners of the keys.
    fn take(
        &mut self,
        (plan, listeners, generations): (&Plan, &BTreeSet<u32>, &[u32]),
        (hash, cpu, port): (u32, u32, u16),
        (now, timeout, table): (u64, u64, u64),
    ) -> Outcome {
        let mut outcome = model(plan, listeners, (hash, cpu), hash.wrapping_mul(MIX.cast_unsigned()), false);
        if plan.ranges.is_empty() || timeout == 0 {
            return outcome;
        }
        let known = self.flows.get(&port).copied();
        let valid = known.filter(|(key, generation, last)| {
            now <= last + timeout && generations[*key as usize] == *generation
        });
        if let Some((key, generation, _)) = valid {
            if listeners.contains(&key) {
                self.flows.insert(port, (key, generation, now));
                return Outcome { verdict: 1, tried: vec![key], counted: vec![] };
            }
            outcome.tried.insert(0, key);
        }
        let Some(key) = outcome.tried.last().copied().filter(|key| listeners.contains(key)) else {
            return outcome;
        };
        self.flows.insert(port, (key, generations[key as usize], now));
        outcome.counted.push((COUNTER_FLOWS, 0));
        if known.is_none() {
            if now > self.window.0 + timeout {
                self.window = (now, 0);
            }
            self.window.1 += 1;
            if self.window.1 > table {
                outcome.counted.push((COUNTER_FLOWS, 1));
            }
        }
        outcome
    }
}

#[test]
fn any_datagram_goes_where_the_model_says() {
    let mut number = numbers();
    let (mut known, mut overflowed) = (0, 0);
    for case in 0..80 {
        let plan = any_plan(&mut number);
        let (density, table) = (number(4), number(8));
        let mut listeners: BTreeSet<u32> = (0..KEYS).filter(|_| number(4) < density).collect();
        datagram_world(&plan, listeners.iter().copied(), table);
        let mut model = Model::default();
        let mut generations = vec![0; KEYS as usize];
        let (mut now, mut timeout) = (1000, 0);
        for _ in 0..60 {
            match number(12) {
                0 => {
                    // Mostly one that matters.
                    let known = model.flows.values().nth(number(4) as usize);
                    let key = known.map_or_else(|| number(KEYS), |flow| flow.0);
                    let generation = number(3);
                    generations[key as usize] = generation;
                    set_owner(key + 1, generation, 0);
                }
                1 => {
                    let key = listeners.pop_first();
                    WORLD.with_borrow_mut(|world| key.map(|key| world.listeners.remove(&key)));
                }
                2 => {
                    timeout = [0, 50, 300][number(3) as usize];
                    set_owner(TIMEOUT_ENTRY, 0, timeout);
                }
                // Times of other processors are not in order.
                3 => now -= u64::from(number(20)),
                _ => now += u64::from(number(40)),
            }
            let port = u16::try_from(number(15)).unwrap();
            let (hash, cpu) = (u32::from(port).wrapping_mul(0x0123_4567), number(8));
            WORLD.with_borrow_mut(|world| world.cpu = cpu);
            set_time(now);
            let outcome = run(&datagram(hash, port));
            let circumstances = (&plan, &listeners, &generations[..]);
            let wanted = model.take(circumstances, (hash, cpu, port), (now, timeout, table.into()));
            assert_eq!(outcome, wanted, "case {case}: {plan:?}");
            if let Some((key, _, last)) = model.flows.get(&port).filter(|flow| flow.2 == now && timeout > 0) {
                assert_eq!(last_at(key + 1), *last);
            }
            known += u32::from(outcome.counted.is_empty());
            overflowed += u32::from(outcome.counted.contains(&(COUNTER_FLOWS, 1)));
        }
        assert_eq!(last_at(TIMEOUT_ENTRY), timeout);
    }
    assert!(known > 200 && overflowed > 100, "{known} of known flows, {overflowed} too many");
}

#[test]
fn a_flow_is_its_addresses_and_its_port() {
    let plan = Plan { ranges: vec![Range { weight_below: 0, base: 0, count: 1, counter: 0, step: 0 }] };
    datagram_world(&plan, [0], 100);
    set_owner(TIMEOUT_ENTRY, 0, 50);
    set_time(1000);
    let is_new = |source: &str, change: usize| {
        let packet = syn(source);
        WORLD.with_borrow_mut(|world| world.net_header[change] ^= 1);
        !run(&packet).counted.is_empty()
    };
    let sources = ["10.1.2.3:4000", "10.1.2.3:4001", "10.1.2.4:4000", "[a01:203::]:4000", "[a01:204::]:4000"];
    assert_eq!(sources.map(|source| is_new(source, 0)), [true; 5]);
    assert_eq!(sources.map(|source| is_new(source, 1)), [false; 5]);
    // The local address: behind the remote one.
    assert_eq!([is_new(sources[0], 16), is_new(sources[0], 19), is_new(sources[0], 20)], [true, true, false]);
    assert_eq!([is_new(sources[3], 24), is_new(sources[3], 39)], [true, true]);
    let known = WORLD.with_borrow(|world| world.flows.len());
    // What can't be read is no flow, and is chosen for all the same.
    let cut = Packet { tcp_header: vec![0x0f, 0xa0, 0], ..syn(sources[0]) };
    assert_eq!(run(&cut), Outcome { verdict: 1, tried: vec![0], counted: vec![(0, 0)] });
    let unreadable = syn(sources[0]);
    WORLD.with_borrow_mut(|world| world.net_header.clear());
    assert_eq!(run(&unreadable), Outcome { verdict: 1, tried: vec![0], counted: vec![(0, 0)] });
    assert_eq!(WORLD.with_borrow(|world| world.flows.len()), known);
}
