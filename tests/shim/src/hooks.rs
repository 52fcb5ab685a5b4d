//! What runs inside Bochs: the instrumentation hooks and the judgement behind them.

use std::ffi::{c_uint, c_void};
use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::{env, ops::Range};

use crate::bochs::{self, Bochs, CpuState};
use crate::code;
use crate::die;
use crate::mishap::{self, Mishap, MsrWrite};
use crate::profile::{Profile, Step};
use crate::truth::{self, Outcome, SplitLock};

/// Bytes in a cache line.
const CACHE_LINE: u64 = 64;
/// Bytes in a page, at whose border Bochs reports one access as two.
const PAGE: u64 = 4096;
/// `rw` of an access that reads what the same instruction will write.
const READ_MODIFY_WRITE: c_uint = 3;
/// Longest instruction, SDM Volume 2, "Instruction Format".
const MAX_INSTRUCTION: u64 = 15;
/// MSR TEST_CTRL.
const TEST_CTRL: c_uint = 0x33;
/// More CPUs than Bochs can have.
const MAX_CPUS: usize = 256;

/// Everything the hooks need, made by [`install`].
struct Shim {
    bochs: Bochs,
    truth: Option<File>,
    profile: Option<(File, Mutex<Profile>)>,
    /// 1 for thread scope.
    threads_per_core: u32,
    /// What happens at the first split lock of a guest.
    mishap: Option<Mishap>,
    /// What the firmware leaves in MSRs.
    left_over: Vec<MsrWrite>,
}

static SHIM: OnceLock<Shim> = OnceLock::new();
/// Made on a CPU's first suspicious access, because Bochs makes its CPUs after the initializer ran.
static CPUS: [OnceLock<CpuState>; MAX_CPUS] = [const { OnceLock::new() }; MAX_CPUS];

fn shim() -> &'static Shim {
    SHIM.get().unwrap_or_else(|| die("a hook ran before the initializer"))
}

/// Reads the environment, finds Bochs' symbols and patches its stubs; ends the process if any of
/// that fails.
pub fn install() {
    let shim = Shim {
        bochs: Bochs::find(),
        truth: output("SLD_SHIM_TRUTH"),
        profile: output("SLD_SHIM_PROFILE").map(|file| (file, Mutex::default())),
        threads_per_core: threads_per_core(),
        mishap: setting("SLD_SHIM_MISHAP", Mishap::parse),
        left_over: setting("SLD_SHIM_MSRS", mishap::parse_writes).unwrap_or_default(),
    };
    let with_left_over = !shim.left_over.is_empty();
    let core_scope = shim.threads_per_core > 1;
    let profiling = shim.profile.is_some();
    if SHIM.set(shim).is_err() {
        die("loaded twice");
    }
    bochs::repair_division();
    bochs::stop_host_clock();
    // SAFETY: the hooks have the stubs' parameters, which stand in the mangled names; Bochs has no
    // thread yet.
    unsafe {
        let access: extern "C" fn(c_uint, u64, u64, c_uint, c_uint, c_uint) =
            if with_left_over { first_lin_access } else { lin_access };
        bochs::replace_stub(c"_Z19bx_instr_lin_accessjmmjjj", access as *const ());
        if core_scope {
            bochs::replace_stub(c"_Z14bx_instr_wrmsrjjm", wrmsr as *const ());
        }
        if profiling {
            let begin = c"_Z25bx_instr_before_executionjP15bxInstruction_c";
            bochs::replace_stub(begin, profile_begin as *const ());
            let repeat = c"_Z25bx_instr_repeat_iterationjP15bxInstruction_c";
            bochs::replace_stub(repeat, profile_repeat as *const ());
            let complete = c"_Z24bx_instr_after_executionjP15bxInstruction_c";
            bochs::replace_stub(complete, profile_complete as *const ());
            bochs::replace_stub(c"_Z15bx_instr_vmexitjjm", profile_exit as *const ());
            if libc::atexit(write_profile) != 0 {
                die("cannot have the profile written at the end");
            }
        }
    }
}

/// The file that an environment variable names, made anew.
fn output(variable: &str) -> Option<File> {
    env::var_os(variable).map(|path| {
        File::create(&path)
            .unwrap_or_else(|why| die(&format!("cannot write {}: {why}", path.display())))
    })
}

/// What an environment variable asks for.
fn setting<T>(variable: &str, parse: impl FnOnce(&str) -> Option<T>) -> Option<T> {
    let text = env::var(variable).ok()?;
    match parse(&text) {
        None => die(&format!("{variable}={text} is not understood")),
        setting => setting,
    }
}

/// State of a CPU that runs.
fn state_of(cpu: u32) -> &'static CpuState {
    CPUS.get(cpu as usize)
        .unwrap_or_else(|| die(&format!("CPU {cpu} is out of range")))
        .get_or_init(|| CpuState::of(&shim().bochs, cpu))
}

fn threads_per_core() -> u32 {
    let threads = env::var("SLD_SHIM_THREADS_PER_CORE").ok();
    match (env::var("SLD_SHIM_SCOPE").as_deref().unwrap_or("thread"), threads) {
        ("thread", None) => 1,
        ("thread", Some(_)) => die("SLD_SHIM_THREADS_PER_CORE is for SLD_SHIM_SCOPE=core"),
        ("core", Some(threads)) => match threads.parse() {
            Ok(threads @ 1..) => threads,
            _ => die(&format!("SLD_SHIM_THREADS_PER_CORE={threads} is not a number of threads")),
        },
        ("core", None) => die("SLD_SHIM_SCOPE=core needs SLD_SHIM_THREADS_PER_CORE"),
        (other, _) => die(&format!("SLD_SHIM_SCOPE={other}: expected thread or core")),
    }
}

/// Called for every access to memory, after address translation and before anything is written.
extern "C" fn lin_access(
    cpu: c_uint,
    linear: u64,
    _physical: u64,
    len: c_uint,
    _memory_type: c_uint,
    rw: c_uint,
) {
    if rw == READ_MODIFY_WRITE
        && may_be_split(linear, len)
        && let Some(vector) = split_lock_raises(cpu, linear, len)
    {
        // SAFETY: this frame owns nothing and Bochs' frames expect it; `cpu` is executing.
        unsafe { shim().bochs.raise(cpu, vector) }
    }
}

/// The same where the firmware is to leave something behind.
extern "C" fn first_lin_access(
    cpu: c_uint,
    linear: u64,
    physical: u64,
    len: c_uint,
    memory_type: c_uint,
    rw: c_uint,
) {
    static DONE: [AtomicBool; MAX_CPUS] = [const { AtomicBool::new(false) }; MAX_CPUS];

    let done = &DONE[cpu as usize];
    if !done.load(Ordering::Relaxed) && state_of(cpu).in_long_mode() {
        done.store(true, Ordering::Relaxed);
        write_msrs(cpu, &shim().left_over);
    }
    lin_access(cpu, linear, physical, len, memory_type, rw);
}

/// Writes MSRs, or ends the process: a machine that is not as it should be proves nothing.
fn write_msrs(cpu: u32, writes: &[MsrWrite]) {
    let here = writes.iter().filter(|write| write.cpu.is_none_or(|only| only == cpu));
    for MsrWrite { number, value, .. } in here {
        if !shim().bochs.set_msr(cpu, *number, *value) {
            die(&format!("MSR {number:#x} of CPU {cpu} cannot be {value:#x}"));
        }
    }
}

/// Whether an access crosses a cache line, or may be the first half of one that crosses a page. The
/// second half never is: it starts a page.
fn may_be_split(linear: u64, len: u32) -> bool {
    let end = linear % CACHE_LINE + u64::from(len);
    end > CACHE_LINE || linear.wrapping_add(u64::from(len)).is_multiple_of(PAGE)
}

/// Judges a suspicious access, records it if it is a split lock, and tells which exception it raises.
fn split_lock_raises(cpu: u32, linear: u64, len: u32) -> Option<c_uint> {
    let Shim { bochs, truth, .. } = shim();
    let state = state_of(cpu);
    let rip = bochs.instruction_start(cpu);
    let instruction_len = state.rip().wrapping_sub(rip);
    if instruction_len == 0 {
        // Between two instructions: the delivery of an interrupt, which makes no such locked access.
        return None;
    }
    let (bits, base) = state.code_segment();
    let mut code = [0; MAX_INSTRUCTION as usize];
    let Some(code) = code.get_mut(..instruction_len as usize) else {
        die(&format!("CPU {cpu}: an instruction of {instruction_len} bytes at {rip:#x}"));
    };
    if !bochs.read_memory(cpu, base.wrapping_add(rip), code) {
        die(&format!("CPU {cpu}: the instruction at {rip:#x} cannot be read"));
    }
    let width = match code::locked_access_width(code, bits) {
        Ok(Some(width)) => width,
        Ok(None) => return None,
        Err(why) => die(&format!("CPU {cpu} at {rip:#x}: {why}")),
    };
    if !is_split(linear, len, width) {
        return None;
    }
    if state.in_vmx_guest() && mishap_comes(cpu) {
        return Some(bochs::MACHINE_CHECK);
    }

    let faults = state.detects_split_locks();
    if let Some(file) = truth {
        let split_lock = SplitLock {
            cpu,
            rip,
            cpl: state.cpl(),
            vmx: state.in_vmx_guest(),
            outcome: if faults { Outcome::Faulted } else { Outcome::Taken },
        };
        if let Err(why) = truth::record(file, &split_lock) {
            die(&format!("cannot write the truth file: {why}"));
        }
    }
    faults.then_some(bochs::ALIGNMENT_CHECK)
}

/// The mishap that is to come, if there is one; whether it is an exception in place of the access.
fn mishap_comes(cpu: u32) -> bool {
    static CAME: AtomicBool = AtomicBool::new(false);

    let Shim { bochs, mishap, .. } = shim();
    match mishap {
        Some(mishap) if !CAME.swap(true, Ordering::Relaxed) => match mishap {
            Mishap::Nmi => {
                bochs.send_nmi(cpu);
                false
            }
            Mishap::MachineCheck(writes) => {
                write_msrs(cpu, writes);
                true
            }
        },
        _ => false,
    }
}

/// Whether a locked access of `width` bytes, of which Bochs reports `len` at `linear`, crosses a cache
/// line. (CMPXCHG16B, reported as two aligned halves, demands alignment and never does.)
fn is_split(linear: u64, len: u32, width: u32) -> bool {
    let first_part_of_page_crossing = linear.wrapping_add(u64::from(len)).is_multiple_of(PAGE);
    (len == width || first_part_of_page_crossing)
        && width <= 8
        && linear % CACHE_LINE + u64::from(width) > CACHE_LINE
}

/// Called when a CPU is about to write an MSR, before Bochs checks the value. With core scope the
/// siblings' copies get the same write, which Bochs then takes or refuses for all of them alike.
extern "C" fn wrmsr(cpu: c_uint, msr: c_uint, value: u64) {
    /// Set while the siblings' writes come through this hook again.
    static SHARING: AtomicBool = AtomicBool::new(false);

    if msr != TEST_CTRL || SHARING.swap(true, Ordering::Relaxed) {
        return;
    }
    let Shim { bochs, threads_per_core, .. } = shim();
    for sibling in core_of(cpu, *threads_per_core) {
        if sibling != cpu && bochs.has_cpu(sibling) {
            bochs.write_msr(sibling, msr, value);
        }
    }
    SHARING.store(false, Ordering::Relaxed);
}

/// The profile, which its hooks alone ask for.
fn profile() -> MutexGuard<'static, Profile> {
    let Some((_, profile)) = &shim().profile else { die("no profile was asked for") };
    profile.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Called before every instruction, if a profile is wanted; so are the next three.
extern "C" fn profile_begin(cpu: c_uint, _instruction: *const c_void) {
    let state = state_of(cpu);
    let rip = shim().bochs.instruction_start(cpu);
    let (in_guest, vmcs, rcx) = (state.in_vmx_guest(), state.vmcs(), state.rcx());
    profile().begin(cpu, Step { in_guest, rip, vmcs, rcx });
}

/// Called after repetitions of a string instruction.
extern "C" fn profile_repeat(cpu: c_uint, _instruction: *const c_void) {
    profile().repeat(cpu);
}

/// Called after every instruction that did not fault.
extern "C" fn profile_complete(cpu: c_uint, _instruction: *const c_void) {
    profile().complete(cpu, state_of(cpu).rcx());
}

/// Called when a CPU is about to leave VMX non-root operation.
extern "C" fn profile_exit(cpu: c_uint, reason: u32, _qualification: u64) {
    profile().exit(cpu, reason, state_of(cpu).vmcs());
}

/// Called when the process exits.
extern "C" fn write_profile() {
    if let Some((file, _)) = &shim().profile
        && let Err(why) = profile().write(file)
    {
        die(&format!("cannot write the profile: {why}"));
    }
}

/// Numbers of the CPUs that share a core with `cpu`, itself included.
fn core_of(cpu: u32, threads_per_core: u32) -> Range<u32> {
    let first = cpu - cpu % threads_per_core;
    first..first + threads_per_core
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_access_is_split_when_it_crosses_a_cache_line() {
        assert!(is_split(0x103d, 4, 4));
        assert!(is_split(0x103f, 2, 2));
        assert!(is_split(0x1039, 8, 8));
        assert!(!is_split(0x103c, 4, 4));
        assert!(!is_split(0x1038, 8, 8));
        assert!(!is_split(0x103f, 1, 1));
    }

    #[test]
    fn an_access_across_two_pages_is_split_once() {
        // A dword at 0x1ffe: two bytes there, two at 0x2000.
        assert!(may_be_split(0x1ffe, 2) && is_split(0x1ffe, 2, 4));
        assert!(!may_be_split(0x2000, 2));
        // A quadword with all but one byte on the second page.
        assert!(may_be_split(0x1fff, 1) && is_split(0x1fff, 1, 8));
        assert!(!may_be_split(0x2000, 7));
        // Whole accesses that end with their page.
        assert!(!is_split(0x1ffc, 4, 4));
        assert!(!is_split(0x1fff, 1, 1));
    }

    #[test]
    fn a_cmpxchg16b_in_two_halves_is_not_split() {
        assert!(!is_split(0x1ff0, 8, 16));
        assert!(!is_split(0x1ff8, 8, 16));
        assert!(!is_split(0x1ff0, 16, 16));
    }

    #[test]
    fn cores_are_runs_of_threads() {
        assert_eq!(core_of(0, 2), 0..2);
        assert_eq!(core_of(3, 2), 2..4);
        assert_eq!(core_of(5, 1), 5..6);
    }
}
