//! The `bpf(2)` commands the steering engine needs, and nothing more.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::asm::AsmError;
use super::btf;
use super::program::Program;

/// Why a BPF action failed.
#[derive(Debug, thiserror::Error)]
pub enum BpfError {
    /// A map could not be created.
    #[error("cannot create the BPF map {name:?}: {source}{}", remedy(source))]
    CreateMap {
        /// The map's name.
        name: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The program was not accepted; the verifier's own words are in `log`.
    #[error("cannot load the steering program: {source}{}{}", remedy(source), show_log(log))]
    Load {
        /// What the kernel said.
        source: io::Error,
        /// The verifier's log, empty when it said nothing.
        log: String,
    },
    /// The program that sets SO_REUSEPORT was not accepted.
    #[error(
        "cannot load the program that sets SO_REUSEPORT: {source}{}{}",
        bind_remedy(source),
        show_log(log)
    )]
    LoadBind {
        /// What the kernel said.
        source: io::Error,
        /// The verifier's log, empty when it said nothing.
        log: String,
    },
    /// It could not be attached to the cgroup.
    #[error(
        "cannot attach the program that sets SO_REUSEPORT to the cgroup: {source}{}",
        bind_remedy(source)
    )]
    AttachBind {
        /// What the kernel said.
        source: io::Error,
    },
    /// The program could not be put together: a mistake of this crate.
    #[error("cannot assemble the steering program: {0}")]
    Assemble(#[from] AsmError),
    /// A map entry could not be read or written.
    #[error("cannot {action} entry {key} of the BPF map {map:?}: {source}")]
    Entry {
        /// The map's name.
        map: &'static str,
        /// "read", "write" or "remove".
        action: &'static str,
        /// The entry's key.
        key: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// A map could not be examined.
    #[error("cannot examine the BPF map {map:?}: {source}")]
    Examine {
        /// The map's name.
        map: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The program could not be attached to the listener's group.
    #[error("cannot attach the steering program to the listener's group: {0}")]
    Attach(#[source] io::Error),
    /// A descriptor could not be duplicated.
    #[error("cannot duplicate the descriptor of a BPF map: {0}; raise LimitNOFILE=")]
    Duplicate(#[source] io::Error),
    /// A plan, key or capacity that the maps have no room for.
    #[error("{0}")]
    Invalid(String),
}

impl BpfError {
    /// The errno behind the failure, where there is one.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            BpfError::CreateMap { source, .. }
            | BpfError::Load { source, .. }
            | BpfError::LoadBind { source, .. }
            | BpfError::AttachBind { source }
            | BpfError::Examine { source, .. }
            | BpfError::Entry { source, .. } => source.raw_os_error(),
            BpfError::Attach(source) | BpfError::Duplicate(source) => source.raw_os_error(),
            BpfError::Assemble(_) | BpfError::Invalid(_) => None,
        }
    }
}

fn remedy(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EPERM) => {
            " (the ebpf engine needs CAP_BPF, and a seccomp filter that lets bpf(2) through: podman and docker have \
             --cap-add and --security-opt seccomp=, a unit AmbientCapabilities= and SystemCallFilter=; or \
             steering.engine = \"cbpf\")"
        }
        Some(libc::ENOSYS) => " (this kernel has no bpf(2): use steering.engine = \"cbpf\")",
        _ => "",
    }
}

fn bind_remedy(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EPERM) => {
            " (it takes CAP_BPF and CAP_NET_ADMIN, a seccomp filter that lets bpf(2) through, and no program of another \
             in a cgroup above that forbids it)"
        }
        _ => "",
    }
}

fn show_log(log: &str) -> String {
    if log.is_empty() { String::new() } else { format!("; the kernel's verifier says:\n{log}") }
}

/// Map types used here (`enum bpf_map_type`).
#[derive(Clone, Copy, Debug)]
#[repr(u32)]
pub(super) enum MapType {
    Array = 2,
    LruHash = 9,
    ReuseportSockarray = 20,
}

const BPF_MAP_CREATE: i32 = 0;
const BPF_MAP_LOOKUP_ELEM: i32 = 1;
const BPF_MAP_UPDATE_ELEM: i32 = 2;
const BPF_MAP_DELETE_ELEM: i32 = 3;
const BPF_PROG_LOAD: i32 = 5;
const BPF_PROG_ATTACH: i32 = 8;
const BPF_PROG_GET_NEXT_ID: i32 = 11;
const BPF_MAP_GET_NEXT_ID: i32 = 12;
const BPF_OBJ_GET_INFO_BY_FD: i32 = 15;
const BPF_BTF_LOAD: i32 = 18;
const BPF_LINK_GET_NEXT_ID: i32 = 31;
/// A later program takes the place of the one before; cgroups below may have others.
const BPF_F_ALLOW_OVERRIDE: u32 = 1;
const LOG_BYTES: usize = 256 * 1024;

/// What a program is for: its type and where it is attached (`bpf_prog_type`, `bpf_attach_type`).
#[derive(Clone, Copy, Debug)]
pub(super) struct Purpose {
    program: u32,
    attach: u32,
}

/// SK_REUSEPORT, SELECT_OR_MIGRATE: selects for new connections and for migrations.
pub(super) const STEER: Purpose = Purpose { program: 21, attach: 40 };
/// CGROUP_SOCK_ADDR, INET4_BIND: sees each `bind()` of an IPv4 socket.
pub(super) const BIND_V4: Purpose = Purpose { program: 18, attach: 8 };
/// CGROUP_SOCK_ADDR, INET6_BIND: the same for IPv6.
pub(super) const BIND_V6: Purpose = Purpose { program: 18, attach: 9 };

#[repr(C)]
#[derive(Default)]
struct CreateAttr {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    map_name: [u8; 16],
}

#[repr(C)]
#[derive(Default)]
struct EntryAttr {
    map_fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct LoadAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
    prog_btf_fd: u32,
    func_info_rec_size: u32,
    func_info: u64,
    func_info_cnt: u32,
    line_info_rec_size: u32,
    line_info: u64,
    line_info_cnt: u32,
    attach_btf_id: u32,
}

#[repr(C)]
#[derive(Default)]
struct AttachAttr {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct TypesAttr {
    btf: u64,
    log_buf: u64,
    size: u32,
    log_size: u32,
    log_level: u32,
    log_true_size: u32,
}

#[repr(C)]
#[derive(Default)]
struct NextIdAttr {
    start_id: u32,
    next_id: u32,
}

#[repr(C)]
#[derive(Default)]
struct InfoAttr {
    fd: u32,
    info_len: u32,
    info: u64,
}

/// The beginning of `struct bpf_map_info`.
#[repr(C)]
#[derive(Default)]
struct MapInfo {
    map_type: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
}

/// What the kernel numbers for all of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Programs.
    Program,
    /// Maps.
    Map,
    /// Links.
    Link,
}

/// Calls `bpf(2)`.
///
/// # Safety
/// `T` must be a prefix of `union bpf_attr` for `command`, without uninitialised padding, and every address
/// in it must be valid, for as long as the call takes, for the kernel's reads and writes of that command.
unsafe fn bpf<T>(command: i32, attr: &mut T) -> io::Result<i32> {
    // SAFETY: the caller vouches for the addresses inside; `attr` itself is valid for reads and writes of size_of::<T>()
    // bytes, the size given, and the kernel takes any prefix of the union as the rest being zero.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { i32::try_from(result).map_err(io::Error::other) }
}

fn short_name(name: &str) -> [u8; 16] {
    let mut short = [0; 16];
    for (to, from) in short.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    short
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// Creates a map; entries are read and written here only in those with u32 keys. The descriptor is close-on-exec, as the
/// kernel makes it.
pub(super) fn create_map(
    kind: MapType,
    name: &'static str,
    (key_size, value_size): (u32, u32),
    max_entries: u32,
) -> Result<OwnedFd, BpfError> {
    let map_name = short_name(name);
    let mut attr = CreateAttr {
        map_type: kind as u32,
        key_size,
        value_size,
        max_entries,
        map_name,
        ..Default::default()
    };
    // SAFETY: CreateAttr is the prefix of bpf_attr for BPF_MAP_CREATE and holds no address.
    let fd =
        unsafe { bpf(BPF_MAP_CREATE, &mut attr) }.map_err(|source| BpfError::CreateMap { name, source })?;
    // SAFETY: the kernel has just given this descriptor to us and to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Writes one entry (BPF_ANY).
///
/// # Errors
/// EINVAL when entries of this map are not of this size, or what else the kernel says.
pub(super) fn update(map: BorrowedFd<'_>, key: u32, value: &[u8]) -> io::Result<()> {
    check_entry(map, value.len())?;
    let mut attr = EntryAttr {
        map_fd: raw(map),
        key: std::ptr::from_ref(&key) as u64,
        value: value.as_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: EntryAttr is the prefix of bpf_attr for BPF_MAP_UPDATE_ELEM. Key and value live across the call, and have
    // the sizes that the kernel reads: `check_entry` has compared them with the map's own, which never change.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut attr) }.map(drop)
}

/// Reads one entry.
///
/// # Errors
/// EINVAL when entries of this map are not of this size, or what else the kernel says.
pub(super) fn lookup(map: BorrowedFd<'_>, key: u32, value: &mut [u8]) -> io::Result<()> {
    check_entry(map, value.len())?;
    let mut attr = EntryAttr {
        map_fd: raw(map),
        key: std::ptr::from_ref(&key) as u64,
        value: value.as_mut_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: EntryAttr is the prefix of bpf_attr for BPF_MAP_LOOKUP_ELEM. The key is read and the value, which is
    // exclusively ours, is written with the sizes that `check_entry` has compared with the map's own.
    unsafe { bpf(BPF_MAP_LOOKUP_ELEM, &mut attr) }.map(drop)
}

/// Removes one entry.
pub(super) fn delete(map: BorrowedFd<'_>, key: u32) -> io::Result<()> {
    let mut attr = EntryAttr { map_fd: raw(map), key: std::ptr::from_ref(&key) as u64, ..Default::default() };
    // SAFETY: EntryAttr is the prefix of bpf_attr for BPF_MAP_DELETE_ELEM. Nothing is written, and of the key, which
    // lives across the call, four bytes are read, or the call fails: all maps here that are deleted from have such keys.
    unsafe { bpf(BPF_MAP_DELETE_ELEM, &mut attr) }.map(drop)
}

/// Entries a map has room for.
pub(super) fn capacity(map: BorrowedFd<'_>) -> io::Result<u32> {
    Ok(info(map)?.max_entries)
}

/// Whether the key of this map is a u32 and its value has so many bytes. A map may have come from the keeper, and be
/// another version's: what the kernel reads and writes at our addresses is what the map says, not what we believe.
fn check_entry(map: BorrowedFd<'_>, value_bytes: usize) -> io::Result<()> {
    let info = info(map)?;
    // Others have an entry for each processor.
    let has_one_value =
        [MapType::Array, MapType::ReuseportSockarray].iter().any(|kind| *kind as u32 == info.map_type);
    let fits = info.key_size == 4 && usize::try_from(info.value_size) == Ok(value_bytes);
    if has_one_value && fits { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EINVAL)) }
}

fn info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    let mut info = MapInfo::default();
    let info_len = u32::try_from(size_of::<MapInfo>()).map_err(io::Error::other)?;
    let mut attr = InfoAttr { fd: raw(map), info_len, info: std::ptr::from_mut(&mut info) as u64 };
    // SAFETY: InfoAttr is the prefix of bpf_attr for BPF_OBJ_GET_INFO_BY_FD. Whatever BPF object it is, the kernel writes
    // at most `info_len` bytes into `info`, which lives across the call and takes any bytes.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok(info)
}

/// The numbers of all objects there are on this machine, whoever made them. Needs CAP_SYS_ADMIN.
///
/// # Errors
/// What the kernel says: EPERM without the right to ask.
pub fn ids(kind: Kind) -> io::Result<Vec<u32>> {
    let command = match kind {
        Kind::Program => BPF_PROG_GET_NEXT_ID,
        Kind::Map => BPF_MAP_GET_NEXT_ID,
        Kind::Link => BPF_LINK_GET_NEXT_ID,
    };
    let (mut ids, mut attr) = (Vec::new(), NextIdAttr::default());
    loop {
        // SAFETY: NextIdAttr is the prefix of bpf_attr for these commands and holds no address.
        match unsafe { bpf(command, &mut attr) } {
            Ok(_) => ids.push(attr.next_id),
            // Behind the last one.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(ids),
            Err(error) => return Err(error),
        }
        attr.start_id = attr.next_id;
    }
}

/// Loads a program. One without functions needs no type information.
///
/// Only a failure pays for the verifier's log: the program is loaded a second time to read it.
pub(super) fn load_program(name: &str, purpose: Purpose, program: &Program) -> Result<OwnedFd, BpfError> {
    let (types, infos) = btf::describe(&program.functions);
    let types = (!infos.is_empty()).then(|| load_types(&types)).transpose();
    let types = types.map_err(|source| BpfError::Load { source, log: String::new() })?;
    let described = (types.as_ref().map(AsFd::as_fd), infos.as_slice());
    let mut log = Vec::new();
    let fd = load_with_log(name, purpose, program, described, &mut log).or_else(|_| {
        log = vec![0; LOG_BYTES];
        load_with_log(name, purpose, program, described, &mut log)
    });
    let fd = fd.map_err(|source| {
        let text: Vec<u8> = log.into_iter().take_while(|&byte| byte != 0).collect();
        BpfError::Load { source, log: String::from_utf8_lossy(&text).trim_end().to_owned() }
    })?;
    // SAFETY: the kernel has just given this descriptor to us and to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Hands type information to the kernel.
fn load_types(types: &[u8]) -> io::Result<OwnedFd> {
    let size = u32::try_from(types.len()).map_err(io::Error::other)?;
    let mut attr = TypesAttr { btf: types.as_ptr() as u64, size, ..Default::default() };
    // SAFETY: TypesAttr is the prefix of bpf_attr for BPF_BTF_LOAD. The blob lives across the call and has the size given,
    // there is no log to be written; the descriptor is new, the kernel has given it to nobody else.
    unsafe { bpf(BPF_BTF_LOAD, &mut attr).map(|fd| OwnedFd::from_raw_fd(fd)) }
}

fn load_with_log(
    name: &str,
    purpose: Purpose,
    program: &Program,
    (types, infos): (Option<BorrowedFd<'_>>, &[[u32; 2]]),
    log: &mut [u8],
) -> io::Result<i32> {
    let mut attr = LoadAttr {
        prog_type: purpose.program,
        insn_cnt: u32::try_from(program.insns.len()).map_err(io::Error::other)?,
        insns: program.insns.as_ptr() as u64,
        // The helpers this program calls are open to any licence; the kernel wants the field all the same.
        license: c"Dual MIT/GPL".as_ptr() as u64,
        log_level: u32::from(!log.is_empty()),
        log_size: u32::try_from(log.len()).map_err(io::Error::other)?,
        log_buf: if log.is_empty() { 0 } else { log.as_mut_ptr() as u64 },
        prog_name: short_name(name),
        expected_attach_type: purpose.attach,
        prog_btf_fd: types.map_or(0, raw),
        func_info_rec_size: 8,
        func_info: infos.as_ptr() as u64,
        func_info_cnt: u32::try_from(infos.len()).map_err(io::Error::other)?,
        ..Default::default()
    };
    // SAFETY: LoadAttr is the prefix of bpf_attr for BPF_PROG_LOAD (its fields leave no padding). Instructions, licence,
    // function records (two words each: 8 bytes) and log live across the call and have the sizes given. Only the log is
    // written to, and `log` is borrowed mutably.
    unsafe { bpf(BPF_PROG_LOAD, &mut attr) }
}

/// Attaches a program to a cgroup, as long as that exists, in place of the one attached before.
pub(super) fn attach_to_cgroup(
    cgroup: BorrowedFd<'_>,
    purpose: Purpose,
    program: BorrowedFd<'_>,
) -> io::Result<()> {
    let mut attr = AttachAttr {
        target_fd: raw(cgroup),
        attach_bpf_fd: raw(program),
        attach_type: purpose.attach,
        attach_flags: BPF_F_ALLOW_OVERRIDE,
    };
    // SAFETY: AttachAttr is the prefix of bpf_attr for BPF_PROG_ATTACH and holds no address.
    unsafe { bpf(BPF_PROG_ATTACH, &mut attr) }.map(drop)
}
