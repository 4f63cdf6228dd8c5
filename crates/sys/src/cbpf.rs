//! The `cbpf` engine: a classic program, attachable without privilege, that names a slot of the group.
//!
//! The program is replaced at each switch. Slots are positions in the group in `listen()` order; keeping
//! the model of them right is the caller's work.

use std::io::{self, BufRead};
use std::os::fd::BorrowedFd;

use nix::sys::socket::{setsockopt, sockopt};

pub use libc::sock_filter as SockFilter;

use crate::socket;

/// A set of slots that gets a share of the new connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    /// The share is chosen when a random u32, or one made of the flow (UDP), is below this (shares are asked in order); the
    /// last one catches all.
    pub weight_below: u32,
    /// Slots. Shares without any are left out.
    pub slots: Vec<u16>,
    /// How one of them is picked.
    pub pick: Pick,
}

/// How one of a share's slots is picked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pick {
    /// Each with the same chance: a random one for a connection; of UDP always the same for a source address and port.
    Hash,
    /// The one at the processor's number, modulo their number: `slots` is in the order of the seats, and may name a slot
    /// twice.
    Cpu,
}

/// Instructions a classic program may have.
const INSTRUCTIONS_MAX: usize = 4096;

const LD_W_ABS: u16 = 0x20;
const LD_H_ABS: u16 = 0x28;
const LD_B_ABS: u16 = 0x30;
const LD_H_IND: u16 = 0x48;
const LD_MEM: u16 = 0x60;
const LDX_MEM: u16 = 0x61;
const LDX_HEADER: u16 = 0xb1;
const ST: u16 = 0x02;
const TAX: u16 = 0x07;
const ALU_ADD_K: u16 = 0x04;
const ALU_MUL_K: u16 = 0x24;
const ALU_RSH_K: u16 = 0x74;
const ALU_MOD_K: u16 = 0x94;
const ALU_XOR_X: u16 = 0xac;
const JMP_JA: u16 = 0x05;
const JMP_JEQ_K: u16 = 0x15;
const JMP_JGE_K: u16 = 0x35;
const RET_K: u16 = 0x06;
const RET_A: u16 = 0x16;
/// `SKF_AD_OFF + SKF_AD_CPU`: not a byte of the packet but the processor's number.
const CPU: u32 = 0xffff_f000 + 36;
/// `SKF_AD_OFF + SKF_AD_RANDOM`: a random word.
const RANDOM: u32 = 0xffff_f000 + 56;
/// `SKF_NET_OFF`: the packet from its IP header on. Without it the packet begins behind the UDP header.
const IP: u32 = 0xfff0_0000;

/// Builds the program for the shares of a TCP or UDP group; empty when no share has a slot.
#[must_use]
pub fn build(shares: &[Share], is_datagram: bool) -> Vec<SockFilter> {
    let shares: Vec<&Share> = shares.iter().filter(|share| !share.slots.is_empty()).collect();
    let needs_flow = shares.len() > 1 || shares.iter().any(|share| share.pick == Pick::Hash);
    let draw = if is_datagram { insn(LD_MEM, 0) } else { insn(LD_W_ABS, RANDOM) };
    let mut program = if is_datagram && needs_flow { flow_hash() } else { Vec::new() };
    for (index, share) in shares.iter().enumerate() {
        let number = match share.pick {
            Pick::Hash => draw,
            Pick::Cpu => insn(LD_W_ABS, CPU),
        };
        let body = pick(number, &share.slots);
        if index + 1 < shares.len() {
            program.push(draw);
            // A conditional jump reaches only 255 instructions, a plain one any number.
            program.push(SockFilter { code: JMP_JGE_K, jt: 0, jf: 1, k: share.weight_below });
            program.push(insn(JMP_JA, u32::try_from(body.len()).unwrap_or(u32::MAX)));
        }
        program.extend(body);
    }
    program
}

/// Memory word 0 = a hash of source address and port, each bit of which depends on each of theirs: its order (shares) says
/// nothing about its remainders (slots). Behind IPv6 extension headers there is no port at the place that is read; such a
/// flow keeps its slot as long as they stay the same.
fn flow_hash() -> Vec<SockFilter> {
    let mut v4 = vec![insn(LDX_HEADER, IP), insn(LD_H_IND, IP), insn(ST, 0), insn(LD_W_ABS, IP + 12)];
    let mut v6 = vec![insn(LD_H_ABS, IP + 40), insn(ST, 0), insn(LD_W_ABS, IP + 8)];
    for word in [12, 16, 20] {
        v6.extend([
            insn(ALU_MUL_K, 0x9e37_79b1),
            insn(TAX, 0),
            insn(LD_W_ABS, IP + word),
            insn(ALU_XOR_X, 0),
        ]);
    }
    v4.push(insn(JMP_JA, u32::try_from(v6.len()).unwrap_or(u32::MAX)));
    // The version, above the IPv4 header's length.
    let mut hash = vec![insn(LD_B_ABS, IP), insn(ALU_RSH_K, 4)];
    hash.push(SockFilter { code: JMP_JEQ_K, jt: u8::try_from(v4.len()).unwrap_or(u8::MAX), jf: 0, k: 6 });
    hash.extend([v4, v6].concat());
    // What is known as the end of MurmurHash3.
    hash.extend([insn(ALU_MUL_K, 0x9e37_79b1), insn(LDX_MEM, 0), insn(ALU_XOR_X, 0)]);
    for (shift, factor) in [(16, 0x85eb_ca6b), (13, 0xc2b2_ae35), (16, 1)] {
        hash.extend([insn(TAX, 0), insn(ALU_RSH_K, shift), insn(ALU_XOR_X, 0), insn(ALU_MUL_K, factor)]);
    }
    hash.push(insn(ST, 0));
    hash
}

/// Returns the slot at a number loaded by `draw`, modulo theirs.
fn pick(draw: SockFilter, slots: &[u16]) -> Vec<SockFilter> {
    let number = u32::try_from(slots.len()).unwrap_or(u32::MAX);
    let mut body = vec![draw, insn(ALU_MOD_K, number)];
    let mut index = 0;
    for run in slots.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
        let first = u32::from(run[0]);
        let end = index + u32::try_from(run.len()).unwrap_or(u32::MAX);
        let is_last = end == number;
        if run.len() == 1 {
            if !is_last {
                body.push(SockFilter { code: JMP_JEQ_K, jt: 0, jf: 1, k: index });
            }
            body.push(insn(RET_K, first));
        } else {
            if !is_last {
                body.push(SockFilter { code: JMP_JGE_K, jt: 2, jf: 0, k: end });
            }
            body.push(insn(ALU_ADD_K, first.wrapping_sub(index)));
            body.push(insn(RET_A, 0));
        }
        index = end;
    }
    body
}

fn insn(code: u16, k: u32) -> SockFilter {
    SockFilter { code, jt: 0, jf: 0, k }
}

/// Steers new connections of the listener's group to the slots; one call, at once, for the whole group.
///
/// # Errors
/// `InvalidInput` when no slot is named or there are more than fit; else what the kernel says.
pub fn attach_slots(listener: BorrowedFd<'_>, shares: &[Share]) -> io::Result<()> {
    let mut program = build(shares, socket::is_datagram(listener)?);
    if program.is_empty() || program.len() > INSTRUCTIONS_MAX {
        let message = format!(
            "a steering program of {} instructions; 1 to {INSTRUCTIONS_MAX} are possible",
            program.len()
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    let len = u16::try_from(program.len()).map_err(io::Error::other)?;
    let filter = libc::sock_fprog { len, filter: program.as_mut_ptr() };
    // `program` outlives the call; the kernel copies it.
    setsockopt(&listener, sockopt::AttachReusePortCbpf, &filter).map_err(io::Error::from)
}

/// Takes the program off the listener's group: the kernel's own hash decides again.
///
/// # Errors
/// ENOENT when none was attached.
pub fn detach(listener: BorrowedFd<'_>) -> io::Result<()> {
    socket::set_option(listener, libc::SO_DETACH_REUSEPORT_BPF, 0)
}

/// Whether this kernel frees a replaced classic program only after a grace period; without that, replacing it
/// under traffic is a use-after-free. `None` when /proc/kallsyms can't tell.
#[must_use]
pub fn has_rcu_fix() -> Option<bool> {
    let mut symbols = io::BufReader::new(std::fs::File::open("/proc/kallsyms").ok()?);
    let (mut is_table, mut is_fixed, mut line) = (false, false, String::new());
    // Line by line: the whole table is some ten megabytes.
    while symbols.read_line(&mut line).ok()? > 0 {
        let name = line.split_ascii_whitespace().nth(2);
        // A symbol every kernel with reuseport has: if it isn't listed the table is hidden from us.
        is_table |= name == Some("reuseport_attach_prog");
        is_fixed |= name == Some("sk_reuseport_prog_free_rcu");
        line.clear();
    }
    is_table.then_some(is_fixed)
}

// An interpreter in an interpreter takes hours.
#[cfg(test)]
#[cfg(not(miri))]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::net::{IpAddr, SocketAddr};

    /// The classic machine, with the instructions used here: the random words, the processor and the packet are given.
    fn run_on(program: &[SockFilter], words: &mut dyn Iterator<Item = u32>, cpu: u32, packet: &[u8]) -> u32 {
        let (mut at, mut acc, mut x, mut memory) = (0, 0_u32, 0_u32, None);
        let byte = |k: u32| u32::from(packet[k.wrapping_sub(IP) as usize]);
        let half = |k: u32| byte(k) << 8 | byte(k + 1);
        loop {
            let SockFilter { code, jt, jf, k } = program[at];
            at += 1;
            match code {
                LD_W_ABS if k == RANDOM => acc = words.next().unwrap(),
                LD_W_ABS if k == CPU => acc = cpu,
                LD_W_ABS => acc = half(k) << 16 | half(k + 2),
                LD_H_ABS => acc = half(k),
                LD_H_IND => acc = half(k + x),
                LD_B_ABS => acc = byte(k),
                LDX_HEADER => x = 4 * (byte(k) & 0xf),
                LDX_MEM => x = memory.unwrap(),
                LD_MEM => acc = memory.unwrap(),
                ST => memory = Some(acc),
                TAX => x = acc,
                ALU_ADD_K => acc = acc.wrapping_add(k),
                ALU_MUL_K => acc = acc.wrapping_mul(k),
                ALU_RSH_K => acc >>= k,
                ALU_MOD_K => acc %= k,
                ALU_XOR_X => acc ^= x,
                JMP_JA => at += k as usize,
                JMP_JEQ_K => at += usize::from(if acc == k { jt } else { jf }),
                JMP_JGE_K => at += usize::from(if acc >= k { jt } else { jf }),
                RET_K => return k,
                RET_A => return acc,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    fn run(program: &[SockFilter], mut random: impl Iterator<Item = u32>) -> u32 {
        run_on(program, &mut random, 0, &[])
    }

    fn share(weight_below: u32, slots: &[u16]) -> Share {
        Share { weight_below, slots: slots.to_vec(), pick: Pick::Hash }
    }

    fn every_choice(slots: &[u16]) -> Vec<u32> {
        let program = build(&[share(0, slots)], false);
        (0..u32::try_from(slots.len()).unwrap()).map(|word| run(&program, [word].into_iter())).collect()
    }

    #[test]
    fn every_slot_is_chosen_once_per_round() {
        for slots in
            [vec![0], vec![7], vec![0, 1, 2, 3], vec![4, 5, 9, 10, 11, 2], vec![3, 1, 0], (0..1024).collect()]
        {
            let wanted: Vec<u32> = slots.iter().map(|&slot| u32::from(slot)).collect();
            assert_eq!(every_choice(&slots), wanted);
        }
    }

    #[test]
    fn a_thousand_scattered_slots_fit() {
        let scattered: Vec<u16> = (0..1024).map(|slot| slot * 2).collect();
        let pairs: Vec<u16> = (0..1024).map(|slot| slot / 2 * 3 + slot % 2).collect();
        for slots in [scattered, pairs] {
            assert!(build(&[share(0, &slots)], true).len() <= INSTRUCTIONS_MAX);
            assert_eq!(every_choice(&slots), slots.iter().map(|&slot| u32::from(slot)).collect::<Vec<_>>());
        }
    }

    #[test]
    fn shares_split_by_weight() {
        let far: Vec<u16> = (0..600).map(|slot| slot * 2).collect();
        let shares = [share(0, &[]), share(1 << 30, &far), share(1 << 31, &[5000]), share(0, &[6000, 6001])];
        let program = build(&shares, false);
        let mut seen = BTreeMap::new();
        for quarter in 0..4_u32 {
            let slot = run(&program, [quarter << 30, quarter << 30, 0].into_iter());
            *seen.entry(slot).or_insert(0) += 1;
        }
        assert_eq!(seen, BTreeMap::from([(0, 1), (5000, 1), (6000, 2)]));
    }

    #[test]
    fn no_slots_no_program() {
        for is_datagram in [false, true] {
            assert!(build(&[], is_datagram).is_empty());
            assert!(build(&[share(0, &[])], is_datagram).is_empty());
        }
    }

    #[test]
    fn the_processor_picks_its_seat() {
        let cpu = Share { pick: Pick::Cpu, ..share(1 << 31, &[4, 9, 4, 0]) };
        for is_datagram in [false, true] {
            let program = build(std::slice::from_ref(&cpu), is_datagram);
            let at = |cpu| run_on(&program, &mut std::iter::empty(), cpu, &[]);
            assert_eq!([0, 1, 2, 3, 4, 4095].map(at), [4, 9, 4, 0, 4, 0]);
        }
        let program = build(&[cpu, share(0, &[7])], false);
        let at = |word, cpu| run_on(&program, &mut [word, 0].into_iter(), cpu, &[]);
        assert_eq!([at(0, 1), at(u32::MAX, 1)], [9, 7]);
    }

    /// A UDP packet from its IP header on.
    fn packet(source: SocketAddr, options: usize) -> Vec<u8> {
        let (mut packet, port) = (vec![0xaa; 100], source.port().to_be_bytes());
        match source.ip() {
            IpAddr::V4(ip) => {
                packet[0] = 0x45 + u8::try_from(options).unwrap();
                packet[12..16].copy_from_slice(&ip.octets());
                packet[20 + 4 * options..][..2].copy_from_slice(&port);
            }
            IpAddr::V6(ip) => {
                packet[0] = 0x60;
                packet[8..24].copy_from_slice(&ip.octets());
                packet[40..42].copy_from_slice(&port);
            }
        }
        packet
    }

    #[test]
    fn a_flow_is_its_source_and_nothing_else() {
        let slots: Vec<u16> = (0..1000).collect();
        let program = build(&[share(0, &slots)], true);
        let slot = |packet: &[u8]| run_on(&program, &mut std::iter::empty(), 3, packet);
        for source in ["10.1.2.3:4000", "[fe80::1:2]:9"] {
            let bare = packet(source.parse().unwrap(), 0);
            let changes_slot = |at: usize| {
                (1..=255).any(|change| {
                    let mut other = bare.clone();
                    other[at] ^= change;
                    slot(&other) != slot(&bare)
                })
            };
            let wanted: Vec<usize> = if bare[0] == 0x45 {
                vec![12, 13, 14, 15, 20, 21]
            } else {
                (8..24).chain([40, 41]).collect()
            };
            assert_eq!((1..100).filter(|&at| changes_slot(at)).collect::<Vec<_>>(), wanted);
        }
        let source = "10.1.2.3:4000".parse().unwrap();
        assert_eq!(slot(&packet(source, 0)), slot(&packet(source, 10)), "IP options");
    }

    #[test]
    fn a_flows_slot_says_nothing_about_its_share() {
        let shares = [share(u32::MAX / 4, &[0, 1, 2, 3]), share(0, &[4, 5, 6, 7])];
        let program = build(&shares, true);
        for ip in ["10.1.2.3", "fe80::1:2"] {
            let mut seen = [0_u32; 8];
            for port in 1..=u16::MAX {
                let source = SocketAddr::new(ip.parse().unwrap(), port);
                seen[run_on(&program, &mut std::iter::empty(), 0, &packet(source, 0)) as usize] += 1;
            }
            assert!(seen[..4].iter().all(|number| (3900..4300).contains(number)), "{seen:?}");
            assert!(seen[4..].iter().all(|number| (12000..12600).contains(number)), "{seen:?}");
        }
    }
}
