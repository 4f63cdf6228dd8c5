//! The program that sets SO_REUSEPORT for sockets whose program does not: it sees every `bind()` in a cgroup, before the
//! kernel looks whether the address is free.
//!
//! In C it would read, for each of the two families:
//!
//! ```c
//! int force(struct bpf_sock_addr *ctx) {
//!     for (rule in rules)                                        // unrolled: addresses are part of the instructions
//!         if (ctx->protocol == rule.protocol && ctx->user_port == rule.port && ctx->user_ip == rule.ip) {
//!             bpf_setsockopt(ctx, SOL_SOCKET, SO_REUSEPORT, &one, sizeof one);
//!             break;
//!         }
//!     return 1;                                                  // bind() goes on, whatever came of it
//! }
//! ```

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};

use super::asm::{AsmError, Assembler, Op, Reg, Size};
use super::program::Program;
use super::raw::{self, BpfError, Purpose};
use crate::diag::Protocol;
use Reg::{R0, R1, R2, R3, R4, R5, R6, R7, R8, R10};

// struct bpf_sock_addr
const CTX_IP4: i16 = 4;
const CTX_IP6: i16 = 8;
const CTX_PORT: i16 = 24;
const CTX_PROTOCOL: i16 = 36;

const HELPER_SETSOCKOPT: i32 = 49;
/// On the stack.
const ONE: i16 = -4;

/// A protocol and an address: what a socket must be of, and be bound to.
pub type Rule = (Protocol, SocketAddr);

/// In the cgroup and all below it, every socket that is bound as one of these rules says from now on has SO_REUSEPORT.
/// `0.0.0.0` includes `[::]`: whether that leaves IPv4 alone can't be seen here. An IPv4 address includes its IPv6 form
/// (`::ffff:127.0.0.1`). Takes the place of what an earlier call has set. It lasts as long as the cgroup.
///
/// # Errors
/// Without CAP_BPF and CAP_NET_ADMIN, or where a cgroup above has a program of this kind that must not be overridden.
pub fn force_reuseport(cgroup: BorrowedFd<'_>, rules: &[Rule]) -> Result<(), BpfError> {
    for (purpose, family) in [(raw::BIND_V4, Family::V4), (raw::BIND_V6, Family::V6)] {
        force_family(cgroup, purpose, &family.build(rules)?)?;
    }
    Ok(())
}

fn force_family(cgroup: BorrowedFd<'_>, purpose: Purpose, program: &Program) -> Result<(), BpfError> {
    let program = raw::load_program("rupd_bind", purpose, program).map_err(|error| match error {
        BpfError::Load { source, log } => BpfError::LoadBind { source, log },
        other => other,
    })?;
    raw::attach_to_cgroup(cgroup, purpose, program.as_fd()).map_err(|source| BpfError::AttachBind { source })
}

#[derive(Clone, Copy)]
enum Family {
    V4,
    V6,
}

impl Family {
    /// Where the address bound to is in the context.
    fn field(self) -> i16 {
        match self {
            Family::V4 => CTX_IP4,
            Family::V6 => CTX_IP6,
        }
    }

    /// The words of addresses that stand for this one.
    fn words(self, ip: IpAddr) -> Vec<Vec<u32>> {
        let words = |octets: &[u8]| {
            let (words, _) = octets.as_chunks::<4>();
            words.iter().map(|word| u32::from_ne_bytes(*word)).collect()
        };
        match (self, ip) {
            (Family::V4, IpAddr::V4(ip)) => vec![words(&ip.octets())],
            (Family::V4, IpAddr::V6(_)) => Vec::new(),
            (Family::V6, IpAddr::V4(ip)) => {
                let any = ip.is_unspecified().then_some(Ipv6Addr::UNSPECIFIED);
                any.into_iter().chain([ip.to_ipv6_mapped()]).map(|ip| words(&ip.octets())).collect()
            }
            (Family::V6, IpAddr::V6(ip)) => vec![words(&ip.octets())],
        }
    }

    fn build(self, rules: &[Rule]) -> Result<Program, AsmError> {
        let mut asm = Assembler::new();
        asm.alu(Op::Mov, R6, R1);
        asm.load(Size::Word, R7, R6, CTX_PORT);
        asm.load(Size::Word, R8, R6, CTX_PROTOCOL);
        let rules = rules.iter().flat_map(|(protocol, address)| {
            let port = u32::from(address.port().to_be());
            self.words(address.ip()).into_iter().map(move |words| (*protocol as u32, port, words))
        });
        let mut has_rules = false;
        for (protocol, port, words) in rules {
            // Each word is a load and a comparison; a rule ends with the jump.
            let mut left = 2 * i16::try_from(words.len()).unwrap_or(0) + 1;
            asm.skip_unless_word(R7, port, left + 1);
            asm.skip_unless_word(R8, protocol, left);
            for (offset, word) in (self.field()..).step_by(4).zip(words) {
                left -= 2;
                asm.load(Size::Word, R1, R6, offset);
                asm.skip_unless_word(R1, word, left);
            }
            asm.jump("force");
            has_rules = true;
        }
        asm.alu_imm(Op::Mov, R0, 1);
        asm.exit();
        // What nothing jumps to the kernel refuses.
        if has_rules {
            force(&mut asm);
        }
        Ok(Program { insns: asm.finish()?, functions: Vec::new() })
    }
}

/// Sets the option and goes on. R6 is the context.
fn force(asm: &mut Assembler) {
    asm.label("force");
    asm.store_imm(Size::Word, R10, ONE, 1);
    asm.alu(Op::Mov, R1, R6);
    asm.alu_imm(Op::Mov, R2, libc::SOL_SOCKET);
    asm.alu_imm(Op::Mov, R3, libc::SO_REUSEPORT);
    asm.alu(Op::Mov, R4, R10);
    asm.alu_imm(Op::Add, R4, i32::from(ONE));
    asm.alu_imm(Op::Mov, R5, 4);
    asm.call(HELPER_SETSOCKOPT);
    asm.alu_imm(Op::Mov, R0, 1);
    asm.exit();
}
