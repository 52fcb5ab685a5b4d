//! Bochs' side of the border: exported symbols, and CPU state through its parameter tree.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::ptr::{self, NonNull};

use crate::code::{self, JUMP_LEN};
use crate::die;

/// Address of an exported symbol of Bochs.
fn symbol(name: &CStr) -> NonNull<c_void> {
    // SAFETY: the name is a C string; a null handle searches the program and what it loaded.
    let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    NonNull::new(address).unwrap_or_else(|| {
        die(&format!("this program has no symbol {name:?}: it is not a Bochs that the shim knows"))
    })
}

/// Puts a jump to `hook` over the empty instrumentation stub `name`.
///
/// # Safety
/// `hook` must be an `extern "C"` function with the stub's parameters, and no other thread may be
/// executing the stub.
pub unsafe fn replace_stub(name: &CStr, hook: *const ()) {
    let stub = symbol(name).cast::<u8>();
    // SAFETY: functions of Bochs are 16 bytes apart and in the middle of its text segment.
    let present = unsafe { std::slice::from_raw_parts(stub.as_ptr(), 16) };
    if !code::is_empty_stub(present) {
        die(&format!("{name:?} is not an empty stub but {present:02x?}"));
    }
    // SAFETY: the stub and its padding are at least JUMP_LEN long, as checked above; the rest is the
    // caller's promise.
    unsafe { redirect(name, stub, hook) };
}

/// Puts a jump to `target` over the start of a function.
///
/// # Safety
/// The function must be at least [`JUMP_LEN`] long, `target` one with the same parameters, and no other
/// thread may be executing it.
unsafe fn redirect(name: &CStr, function: NonNull<u8>, target: *const ()) {
    let page_size = page_size();
    let first_page = function.addr().get() & !(page_size - 1);
    let end = function.addr().get() + JUMP_LEN;
    let protect = |access: c_int| {
        let start = ptr::with_exposed_provenance_mut(first_page);
        // SAFETY: the pages are those of the function, which stay executable throughout.
        if unsafe { libc::mprotect(start, end - first_page, access) } != 0 {
            let why = std::io::Error::last_os_error();
            die(&format!("cannot change the protection of {name:?}: {why}"));
        }
    };
    protect(libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC);
    let jump = code::jump_to(target.addr());
    // SAFETY: (1) the pages are writable now; (2) the function is long enough and (3) nobody executes
    // it meanwhile, as the caller promises.
    unsafe { ptr::copy_nonoverlapping(jump.as_ptr(), function.as_ptr(), JUMP_LEN) };
    protect(libc::PROT_READ | libc::PROT_EXEC);
}

/// `Bit128s`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Signed128 {
    low: u64,
    high: i64,
}

/// `void long_idiv(Bit128s *quotient, Bit64s *remainder, const Bit128s *dividend, Bit64s divisor)`
type LongDivision = unsafe extern "C" fn(*mut Signed128, *mut i64, *const Signed128, i64);

/// What IDIV of 64-bit registers comes to in Bochs, done right. Bochs has ruled out a divisor of 0.
unsafe extern "C" fn long_division(
    quotient: *mut Signed128,
    remainder: *mut i64,
    dividend: *const Signed128,
    divisor: i64,
) {
    // SAFETY: Bochs passes pointers to variables of these types.
    unsafe {
        let Signed128 { low, high } = *dividend;
        let dividend = i128::from(high) << 64 | i128::from(low);
        // It overflows only where the quotient is too large for the instruction anyway.
        let result = dividend.wrapping_div(divisor.into());
        *quotient = Signed128 { low: result as u64, high: (result >> 64) as i64 };
        *remainder = dividend.wrapping_rem(divisor.into()) as i64;
    }
}

/// Replaces Bochs' 64-bit signed division if it is wrong: the compiler of Debian's 3.1 has left out that
/// the dividend is stored, since Bochs reads it as another type. Linux does not boot with that.
pub fn repair_division() {
    const NAME: &CStr = c"_Z9long_idivP7Bit128sPlPKS_l";

    let function = symbol(NAME);
    // SAFETY: the name is mangled from these parameters.
    let divide = unsafe { std::mem::transmute::<NonNull<c_void>, LongDivision>(function) };
    let right =
        [(100, 3), (-100, 3), (100, -3), (-100, -3)].into_iter().all(|(dividend, divisor)| {
            let parts = |number: i64| Signed128 { low: number as u64, high: number >> 63 };
            let (mut quotient, mut remainder) = (parts(0), 0);
            // SAFETY: it works on its arguments alone, which are variables of these types.
            unsafe { divide(&raw mut quotient, &raw mut remainder, &parts(dividend), divisor) };
            let found = (quotient.low as i64, quotient.high, remainder);
            let expected = dividend / divisor;
            found == (expected, expected >> 63, dividend % divisor)
        });
    if !right {
        // SAFETY: a function that divides numbers of 128 bits is longer than a jump; the replacement
        // has its parameters; Bochs has not begun to run.
        unsafe { redirect(NAME, function.cast(), long_division as *const ()) };
    }
}

/// Stops the host's clock for Bochs, which has it switch the status bar's lamps off. That a timer goes off
/// is enough to change how far CPUs get in their turns, so machines of several CPUs would not run the same
/// way every time, on a busy host least of all.
pub fn stop_host_clock() {
    const NAME: &CStr = c"bx_get_realtime64_usec";

    /// `Bit64u bx_get_realtime64_usec(void)`: microseconds since 1970.
    extern "C" fn stopped() -> u64 {
        0
    }
    // SAFETY: a function that asks the system for the time and multiplies it is longer than a jump; the
    // replacement has its (no) parameters; Bochs has not begun to run.
    unsafe { redirect(NAME, symbol(NAME).cast(), stopped as *const ()) };
}

fn page_size() -> usize {
    // SAFETY: no preconditions.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or_else(|_| die("the page size is unknown"))
}

/// A `BX_CPU_C` object.
type CpuObject = *mut c_void;
/// A `bx_param_c` object, or null.
type ParamObject = *mut c_void;
/// `Bit64s CLASS::get64(this)`
type Get64 = unsafe extern "C" fn(ParamObject) -> i64;

/// `#AC`, SDM Volume 3, "Interrupt 17: Alignment Check Exception".
pub const ALIGNMENT_CHECK: c_uint = 17;
/// `#MC`, SDM Volume 3, "Interrupt 18: Machine-Check Exception".
pub const MACHINE_CHECK: c_uint = 18;

/// `void bx_shadow_num_c::set(this, value)`
type Set64 = unsafe extern "C" fn(ParamObject, i64);

/// Classes of numbers in the parameter tree: a stored number, a reference to one, and to a flag. Each
/// with its virtual table and its reader.
const NUMBER_CLASSES: [(&CStr, &CStr); 3] = [
    (c"_ZTV14bx_param_num_c", c"_ZN14bx_param_num_c5get64Ev"),
    SHADOW_CLASS,
    (c"_ZTV16bx_shadow_bool_c", c"_ZN16bx_shadow_bool_c5get64Ev"),
];
/// The class of registers.
const SHADOW_CLASS: (&CStr, &CStr) = (c"_ZTV15bx_shadow_num_c", c"_ZN15bx_shadow_num_c5get64Ev");

/// In the Itanium C++ ABI an object's virtual pointer leads past the two head entries of its table.
const VTABLE_HEAD: usize = 16;

/// What is needed of Bochs. All functions of it must be called on Bochs' simulation thread.
pub struct Bochs {
    /// `BX_CPU_C **bx_cpu_array`, filled in by Bochs after this library's initializer has run.
    cpu_array: *const *const CpuObject,
    /// `SIM`, the simulator interface, filled in later too.
    sim: *const *mut c_void,
    get_param: unsafe extern "C" fn(*mut c_void, *const c_char, ParamObject) -> ParamObject,
    exception: unsafe extern "C" fn(CpuObject, c_uint, u16) -> !,
    wrmsr: unsafe extern "C" fn(CpuObject, u32, u64) -> bool,
    deliver_nmi: unsafe extern "C" fn(CpuObject),
    read_linear: unsafe extern "C" fn(c_uint, u64, c_uint, *mut u8) -> bool,
    number_classes: [(usize, Get64); 3],
    set_shadow: Set64,
    /// Where a `BX_CPU_C` keeps the start of the instruction that it executes, in bytes.
    prev_rip: usize,
}

// SAFETY: the pointers lead to variables and functions of Bochs, which simulates all CPUs on one
// thread; the hooks, which alone use this, run on that thread.
unsafe impl Send for Bochs {}
// SAFETY: as above.
unsafe impl Sync for Bochs {}

impl Bochs {
    /// Finds everything or ends the process.
    pub fn find() -> Self {
        // SAFETY: each symbol's name is mangled from its parameters, which are those of the type that it
        // gets here; `bool` and the integers have the same layout on both sides.
        unsafe {
            Self {
                cpu_array: symbol(c"bx_cpu_array").as_ptr().cast(),
                sim: symbol(c"SIM").as_ptr().cast(),
                get_param: std::mem::transmute::<
                    NonNull<c_void>,
                    unsafe extern "C" fn(*mut c_void, *const c_char, ParamObject) -> ParamObject,
                >(symbol(
                    c"_ZN13bx_real_sim_c9get_paramEPKcP10bx_param_c",
                )),
                exception: std::mem::transmute::<
                    NonNull<c_void>,
                    unsafe extern "C" fn(CpuObject, c_uint, u16) -> !,
                >(symbol(c"_ZN8BX_CPU_C9exceptionEjt")),
                wrmsr: std::mem::transmute::<
                    NonNull<c_void>,
                    unsafe extern "C" fn(CpuObject, u32, u64) -> bool,
                >(symbol(c"_ZN8BX_CPU_C5wrmsrEjm")),
                deliver_nmi: std::mem::transmute::<NonNull<c_void>, unsafe extern "C" fn(CpuObject)>(
                    symbol(c"_ZN8BX_CPU_C11deliver_NMIEv"),
                ),
                read_linear: std::mem::transmute::<
                    NonNull<c_void>,
                    unsafe extern "C" fn(c_uint, u64, c_uint, *mut u8) -> bool,
                >(symbol(c"_Z18bx_dbg_read_linearjmjPh")),
                number_classes: NUMBER_CLASSES.map(|(table, get64)| {
                    let reader = std::mem::transmute::<NonNull<c_void>, Get64>(symbol(get64));
                    (symbol(table).addr().get() + VTABLE_HEAD, reader)
                }),
                set_shadow: std::mem::transmute::<NonNull<c_void>, Set64>(symbol(
                    c"_ZN15bx_shadow_num_c3setEl",
                )),
                prev_rip: prev_rip_offset(),
            }
        }
    }

    /// The CPU object, or null if there is no such CPU.
    fn cpu(&self, cpu: u32) -> CpuObject {
        // SAFETY: hooks run when the machine does, so Bochs has filled its array; `cpu` is a number that
        // Bochs gave, or one whose parameters exist.
        unsafe { (*self.cpu_array).add(cpu as usize).read() }
    }

    /// Raises an exception with error code 0 (if it has any) on `cpu`, as a fault of the instruction that
    /// it executes, or makes the VM exit.
    ///
    /// # Safety
    /// Does not return but jumps back into Bochs' execution loop (`longjmp`): no frame between may have
    /// a destructor to run. `cpu` must be the CPU that is executing.
    pub unsafe fn raise(&self, cpu: u32, vector: c_uint) -> ! {
        // SAFETY: `this` is the executing CPU, the caller answers for the frames.
        unsafe { (self.exception)(self.cpu(cpu), vector, 0) }
    }

    /// Sends `cpu` an NMI, as its local APIC's LINT1 would.
    pub fn send_nmi(&self, cpu: u32) {
        // SAFETY: the CPU object exists; the NMI is taken after the instruction.
        unsafe { (self.deliver_nmi)(self.cpu(cpu)) };
    }

    /// Writes an MSR of `cpu` as that CPU's own WRMSR would, if it may: whether it did. A refused write
    /// changes nothing.
    pub fn write_msr(&self, cpu: u32, msr: u32, value: u64) -> bool {
        // SAFETY: the CPU object exists; refusal is the returned value, not an exception.
        unsafe { (self.wrmsr)(self.cpu(cpu), msr, value) }
    }

    /// Makes an MSR of `cpu` hold `value`, whether or not WRMSR could.
    pub fn set_msr(&self, cpu: u32, msr: u32, value: u64) -> bool {
        /// IA32_FEATURE_CONTROL.
        const FEATURE_CONTROL: u32 = 0x3a;
        let path = match msr {
            FEATURE_CONTROL => "MSR.ia32_feature_ctrl".to_owned(),
            _ => format!("USER_MSR.msr_0x{msr:03x}.val64"),
        };
        let Some(number) = self.optional_number(&format!("bochs.cpu{cpu}.{path}")) else {
            return self.write_msr(cpu, msr, value);
        };
        // SAFETY: the virtual pointer says that the object is of the class whose function this is.
        unsafe {
            let vtable = number.object.cast::<usize>().read();
            if vtable != symbol(SHADOW_CLASS.0).addr().get() + VTABLE_HEAD {
                die(&format!("Bochs' parameter {path} is not a register"));
            }
            (self.set_shadow)(number.object.as_ptr(), value.cast_signed());
        }
        number.get() == value
    }

    /// Start of the instruction that `cpu` executes: the RIP that a fault in it reports.
    pub fn instruction_start(&self, cpu: u32) -> u64 {
        // SAFETY: the offset is the one from which Bochs' own code reads this member.
        unsafe { self.cpu(cpu).byte_add(self.prev_rip).cast::<u64>().read_unaligned() }
    }

    /// Reads `cpu`'s memory at a linear address without side effects, by its present page tables.
    pub fn read_memory(&self, cpu: u32, linear: u64, buffer: &mut [u8]) -> bool {
        // SAFETY: the buffer is valid for its length.
        unsafe { (self.read_linear)(cpu, linear, buffer.len() as c_uint, buffer.as_mut_ptr()) }
    }

    /// Entry `path` (names joined by dots) of the parameter tree.
    fn param(&self, path: &str) -> Option<NonNull<c_void>> {
        let path = CString::new(path).unwrap_or_else(|_| die("a parameter's path holds a NUL"));
        // SAFETY: SIM is set before the machine runs; a null base means the root of the tree.
        let object = unsafe { (self.get_param)(*self.sim, path.as_ptr(), ptr::null_mut()) };
        NonNull::new(object)
    }

    /// Whether the machine has a CPU of this number.
    pub fn has_cpu(&self, cpu: u32) -> bool {
        self.param(&format!("bochs.cpu{cpu}")).is_some()
    }

    /// Number `path` of the parameter tree, if there is such an entry.
    fn optional_number(&self, path: &str) -> Option<Number> {
        let object = self.param(path)?;
        // SAFETY: a parameter is a polymorphic C++ object: its first word is its virtual pointer.
        let vtable = unsafe { object.cast::<usize>().read() };
        let class = self.number_classes.iter().find(|(table, _)| *table == vtable);
        let Some((_, get64)) = class else {
            die(&format!("Bochs' parameter {path} is not a number of a known class"));
        };
        Some(Number { object, get64: *get64 })
    }

    /// Number `path` of the parameter tree, without which there is no ground truth.
    fn number(&self, path: &str) -> Number {
        self.optional_number(path).unwrap_or_else(|| die(&format!("Bochs has no parameter {path}")))
    }
}

/// The offset that Bochs' `BX_CPU_C::atexit` uses: all it does is `debug(prev_rip)`.
fn prev_rip_offset() -> usize {
    let function = symbol(c"_ZN8BX_CPU_C6atexitEv");
    let callee = symbol(c"_ZN8BX_CPU_C5debugEm").addr().get() as u64;
    // SAFETY: the function lies in the middle of Bochs' text segment.
    let code = unsafe { std::slice::from_raw_parts(function.as_ptr().cast::<u8>(), 32) };
    let offset = code::forwarded_field(code, function.addr().get() as u64, callee);
    offset.and_then(|offset| usize::try_from(offset).ok()).unwrap_or_else(|| {
        die(&format!("BX_CPU_C::atexit does not tell where prev_rip is: {code:02x?}"))
    })
}

/// A number in the parameter tree. Entries live as long as the machine.
#[derive(Clone, Copy)]
struct Number {
    object: NonNull<c_void>,
    get64: Get64,
}

impl Number {
    fn get(self) -> u64 {
        // SAFETY: `get64` is the reader of the object's class.
        unsafe { (self.get64)(self.object.as_ptr()).cast_unsigned() }
    }
}

/// Present state of one CPU, as Bochs would save it.
pub struct CpuState {
    rip: Number,
    rcx: Number,
    cr0: Number,
    eflags: Number,
    efer: Number,
    cs_selector: Number,
    cs_base: Number,
    cs_default_size: Number,
    cs_long: Number,
    /// Absent on a model without VMX, as is the next.
    in_vmx_guest: Option<Number>,
    vmcs: Option<Number>,
    /// Absent on a machine without MSR 0x33.
    test_ctrl: Option<Number>,
}

// SAFETY: read only on Bochs' simulation thread, see `Bochs`.
unsafe impl Send for CpuState {}
// SAFETY: as above.
unsafe impl Sync for CpuState {}

const CR0_PE: u64 = 1 << 0;
const EFLAGS_VM: u64 = 1 << 17;
const EFER_LMA: u64 = 1 << 10;
/// TEST_CTRL bit 29: raise `#AC` on a split lock.
const SPLIT_LOCK_DETECT: u64 = 1 << 29;

impl CpuState {
    pub fn of(bochs: &Bochs, cpu: u32) -> Self {
        let number = |name: &str| bochs.number(&format!("bochs.cpu{cpu}.{name}"));
        let optional = |list: &str, name: &str| {
            bochs.optional_number(&format!("bochs.cpu{cpu}.{list}.{name}"))
        };
        // A tree in which the very list is missing has another layout, and not a machine without the MSR.
        if bochs.param(&format!("bochs.cpu{cpu}.USER_MSR")).is_none() {
            die("Bochs does not list the MSRs of its msrs= file (USER_MSR)");
        }
        let in_vmx_guest = optional("VMX", "in_vmx_guest");
        if in_vmx_guest.is_none() && number("vmx_extensions_bitmask").get() != 0 {
            die("the CPU model has VMX, but Bochs does not tell whether it is in a guest");
        }
        Self {
            rip: number("RIP"),
            rcx: number("RCX"),
            cr0: number("CR0"),
            eflags: number("EFLAGS"),
            efer: number("MSR.EFER"),
            cs_selector: number("CS.selector"),
            cs_base: number("CS.base"),
            cs_default_size: number("CS.d_b"),
            cs_long: number("CS.l"),
            in_vmx_guest,
            vmcs: optional("VMX", "vmcsptr"),
            test_ctrl: optional("USER_MSR.msr_0x033", "val64"),
        }
    }

    /// Instruction pointer. While an instruction executes, it is the end of that instruction.
    pub fn rip(&self) -> u64 {
        self.rip.get()
    }

    /// RCX.
    pub fn rcx(&self) -> u64 {
        self.rcx.get()
    }

    /// Privilege level; 0 in real mode, 3 in virtual-8086 mode.
    ///
    /// Between setting CR0.PE and the far jump behind it CS still holds a real-mode segment, whose low
    /// bits are taken for the level: no software takes locks there.
    pub fn cpl(&self) -> u8 {
        if self.cr0.get() & CR0_PE == 0 {
            0
        } else if self.eflags.get() & EFLAGS_VM != 0 {
            3
        } else {
            (self.cs_selector.get() & 3) as u8
        }
    }

    /// Code size in bits and linear address of offset 0 of the code segment.
    pub fn code_segment(&self) -> (u32, u64) {
        if self.efer.get() & EFER_LMA != 0 && self.cs_long.get() != 0 {
            (64, 0)
        } else {
            let bits = if self.cs_default_size.get() != 0 { 32 } else { 16 };
            (bits, self.cs_base.get())
        }
    }

    /// In 64-bit or compatibility mode.
    pub fn in_long_mode(&self) -> bool {
        self.efer.get() & EFER_LMA != 0
    }

    /// In VMX non-root operation.
    pub fn in_vmx_guest(&self) -> bool {
        self.in_vmx_guest.is_some_and(|flag| flag.get() != 0)
    }

    /// Address of the current VMCS; all ones where there is none.
    pub fn vmcs(&self) -> u64 {
        self.vmcs.map_or(u64::MAX, Number::get)
    }

    /// Whether a split lock faults.
    pub fn detects_split_locks(&self) -> bool {
        self.test_ctrl.is_some_and(|msr| msr.get() & SPLIT_LOCK_DETECT != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signed_division_is_that_of_the_instruction() {
        let divide = |dividend: i128, divisor: i64| {
            let dividend = Signed128 { low: dividend as u64, high: (dividend >> 64) as i64 };
            let (mut quotient, mut remainder) = (dividend, 0);
            // SAFETY: pointers to variables of these types.
            unsafe { long_division(&raw mut quotient, &raw mut remainder, &dividend, divisor) };
            (i128::from(quotient.high) << 64 | i128::from(quotient.low), remainder)
        };
        assert_eq!(divide(1_000_000_000, 1000), (1_000_000, 0));
        assert_eq!(divide(-100, 3), (-33, -1));
        assert_eq!(divide(100, -3), (-33, 1));
        assert_eq!(divide(1 << 64, 3), (0x5555_5555_5555_5555, 1));
        // Too large for the instruction: Bochs sees that by the high half.
        assert_eq!(divide(i128::MAX, 1), (i128::MAX, 0));
        assert_eq!(divide(i128::MIN, -1), (i128::MIN, 0));
    }
}
