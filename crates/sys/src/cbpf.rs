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
    /// The share is chosen when a random u32 is below this (shares are asked in order); the last one catches all.
    pub weight_below: u32,
    /// Slots, each with the same chance. Shares without slots are left out.
    pub slots: Vec<u16>,
}

/// Instructions a classic program may have.
const INSTRUCTIONS_MAX: usize = 4096;

const LD_W_ABS: u16 = 0x20;
const ALU_ADD_K: u16 = 0x04;
const ALU_MOD_K: u16 = 0x94;
const JMP_JA: u16 = 0x05;
const JMP_JEQ_K: u16 = 0x15;
const JMP_JGE_K: u16 = 0x35;
const RET_K: u16 = 0x06;
const RET_A: u16 = 0x16;
/// `SKF_AD_OFF + SKF_AD_RANDOM`: not a byte of the packet but a random word.
const RANDOM: u32 = 0xffff_f000 + 56;

/// Builds the program for the shares; empty when no share has a slot.
#[must_use]
pub fn build(shares: &[Share]) -> Vec<SockFilter> {
    let shares: Vec<&Share> = shares.iter().filter(|share| !share.slots.is_empty()).collect();
    let mut program = Vec::new();
    for (index, share) in shares.iter().enumerate() {
        let body = pick(&share.slots);
        if index + 1 < shares.len() {
            program.push(insn(LD_W_ABS, RANDOM));
            // A conditional jump reaches only 255 instructions, a plain one any number.
            program.push(SockFilter { code: JMP_JGE_K, jt: 0, jf: 1, k: share.weight_below });
            program.push(insn(JMP_JA, u32::try_from(body.len()).unwrap_or(u32::MAX)));
        }
        program.extend(body);
    }
    program
}

/// Returns one of the slots, each with the same chance.
fn pick(slots: &[u16]) -> Vec<SockFilter> {
    let number = u32::try_from(slots.len()).unwrap_or(u32::MAX);
    let mut body = vec![insn(LD_W_ABS, RANDOM), insn(ALU_MOD_K, number)];
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
    let mut program = build(shares);
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// The classic machine, with the instructions used here and the random words given.
    fn run(program: &[SockFilter], mut random: impl Iterator<Item = u32>) -> u32 {
        let (mut at, mut acc) = (0, 0_u32);
        loop {
            let SockFilter { code, jt, jf, k } = program[at];
            at += 1;
            match code {
                LD_W_ABS if k == RANDOM => acc = random.next().unwrap(),
                ALU_ADD_K => acc = acc.wrapping_add(k),
                ALU_MOD_K => acc %= k,
                JMP_JA => at += k as usize,
                JMP_JEQ_K => at += usize::from(if acc == k { jt } else { jf }),
                JMP_JGE_K => at += usize::from(if acc >= k { jt } else { jf }),
                RET_K => return k,
                RET_A => return acc,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    fn every_choice(slots: &[u16]) -> Vec<u32> {
        let program = build(&[Share { weight_below: 0, slots: slots.to_vec() }]);
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
            assert!(build(&[Share { weight_below: 0, slots: slots.clone() }]).len() <= INSTRUCTIONS_MAX);
            assert_eq!(every_choice(&slots), slots.iter().map(|&slot| u32::from(slot)).collect::<Vec<_>>());
        }
    }

    #[test]
    fn shares_split_by_weight() {
        let far: Vec<u16> = (0..600).map(|slot| slot * 2).collect();
        let shares = [
            Share { weight_below: 0, slots: vec![] },
            Share { weight_below: 1 << 30, slots: far },
            Share { weight_below: 1 << 31, slots: vec![5000] },
            Share { weight_below: 0, slots: vec![6000, 6001] },
        ];
        let program = build(&shares);
        let mut seen = BTreeMap::new();
        for quarter in 0..4_u32 {
            let slot = run(&program, [quarter << 30, quarter << 30, 0].into_iter());
            *seen.entry(slot).or_insert(0) += 1;
        }
        assert_eq!(seen, BTreeMap::from([(0, 1), (5000, 1), (6000, 2)]));
    }

    #[test]
    fn no_slots_no_program() {
        assert!(build(&[]).is_empty());
        assert!(build(&[Share { weight_below: 0, slots: vec![] }]).is_empty());
    }
}
