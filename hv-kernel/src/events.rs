//! The event stream on COM2: one JSON object a line for every decision.
//!
//! What happens on an exit path is put into a ring of the vCPU, unformatted, and written out in its
//! turns. The time that this takes is the vCPU's: while much is to be written, its guest waits.

use alloc::boxed::Box;
use core::fmt::{self, Write};

use arrayvec::ArrayVec;
use sld::{MsrWrite, RealBit};
use vmx::split_lock::AcReport;

use crate::offenders::Offenders;
use crate::serial;

/// Events that a ring holds.
const RING: usize = 128;
/// What one exit, with a load and a put, may add.
const MARGIN: usize = 14;

/// An event of an exit path.
#[derive(Debug, Clone, Copy)]
pub enum Event {
    /// A guest raised #AC.
    Ac(AcReport),
    /// A guest wrote 0x33.
    TestCtrlWrite {
        /// What it wrote.
        value: u64,
        /// What came of it.
        result: MsrWrite,
    },
    /// The real bit was written.
    RealBit(RealBit),
    /// The software's bit was: tracing begins or ends.
    TraceBit(RealBit),
    /// A vCPU is loaded, and its guest about to run. Its task's flag is this.
    Load {
        /// SLD_DISABLED.
        disabled: bool,
    },
    /// Its guest does not run any more, and it is about to be put.
    Put {
        /// SLD_DISABLED.
        disabled: bool,
    },
}

/// Where and when something happened.
#[derive(Debug, Clone, Copy)]
pub struct Stamp {
    /// The TSC.
    pub tsc: u64,
    /// The CPU.
    pub cpu: u32,
    /// Which of the CPU's events it is, from 0.
    pub seq: u64,
}

/// What an event is about: a VM's name and the vCPU in it.
pub type Subject = (&'static str, u32);

#[derive(Debug, Clone, Copy)]
struct Record {
    stamp: Stamp,
    subject: Option<Subject>,
    event: Event,
}

/// Events that are not yet written out.
#[derive(Debug)]
pub struct Ring {
    records: Box<ArrayVec<Record, RING>>,
    /// So many of them are written. All are forgotten when all are: the usual case, adding one,
    /// stays short.
    written: usize,
    /// Where the guest splits locks, by the events that are written: what an exit takes is as little as
    /// can be.
    pub offenders: Offenders,
}

impl Ring {
    /// What one takes on the heap.
    #[cfg(not(test))]
    pub const BYTES: usize = size_of::<ArrayVec<Record, RING>>() + Offenders::BYTES;

    /// An empty ring.
    pub fn new() -> Self {
        Self { records: Box::new(ArrayVec::new()), written: 0, offenders: Offenders::new() }
    }

    /// Adds an event. Without room all are written first, however long that takes.
    #[inline]
    pub fn push(&mut self, stamp: Stamp, subject: Option<Subject>, event: Event) {
        if self.records.is_full() {
            self.write_all();
        }
        self.records.push(Record { stamp, subject, event });
    }

    /// Whether so much is to be written that the guest has to wait.
    pub fn is_over_half(&self) -> bool {
        self.records.len() - self.written > RING / 2 || self.is_nearly_full()
    }

    /// Whether another exit might find no room.
    #[inline]
    pub fn is_nearly_full(&self) -> bool {
        self.records.len() > RING - MARGIN
    }

    /// Whether there is nothing to write.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Writes the oldest event out; false if there is none, or another CPU has the port.
    pub fn write_one(&mut self) -> bool {
        let Some(record) = self.records.get(self.written) else { return false };
        let write = |out: &mut dyn Write| line(out, record.stamp, |json| record.write(json));
        let written = serial::EVENTS.try_with(write).is_some();
        if written {
            self.forget_one();
        }
        written
    }

    fn forget_one(&mut self) {
        if let Some(Record { stamp, event: Event::Ac(report), .. }) = self.records.get(self.written)
        {
            self.offenders.count(report, stamp.tsc);
        }
        self.written += 1;
        if self.written == self.records.len() {
            self.records.clear();
            self.written = 0;
        }
    }

    /// Writes all events out, however long that takes. Apart, so that the usual case saves no
    /// registers for it.
    #[cold]
    #[inline(never)]
    pub fn write_all(&mut self) {
        while let Some(record) = self.records.get(self.written) {
            serial::EVENTS.with(|out| line(out, record.stamp, |json| record.write(json)));
            self.forget_one();
        }
    }
}

/// Writes an event out at once. `name` is the event's; `fields` adds to it.
pub fn write(stamp: Stamp, name: &str, fields: impl FnOnce(&mut Object<'_>) -> fmt::Result) {
    serial::EVENTS.with(|out| {
        line(out, stamp, |json| {
            json.text("event", name)?;
            fields(json)
        })
    });
}

/// The same if no other CPU has the port; whether it is written. `stamp` is asked only then.
pub fn try_write(
    stamp: impl FnOnce() -> Stamp,
    name: &str,
    fields: impl FnOnce(&mut Object<'_>) -> fmt::Result,
) -> bool {
    let write = |out: &mut dyn Write| {
        line(out, stamp(), |json| {
            json.text("event", name)?;
            fields(json)
        })
    };
    serial::EVENTS.try_with(write).is_some()
}

fn line(
    out: &mut dyn Write,
    stamp: Stamp,
    fields: impl FnOnce(&mut Object<'_>) -> fmt::Result,
) -> fmt::Result {
    let mut json = Object::open(out)?;
    json.number("seq", stamp.seq)?;
    json.number("tsc", stamp.tsc)?;
    json.number("cpu", stamp.cpu)?;
    fields(&mut json)?;
    json.close()?;
    out.write_str("\n")
}

impl Record {
    fn write(&self, json: &mut Object<'_>) -> fmt::Result {
        json.text(
            "event",
            match self.event {
                Event::Ac(_) => "ac",
                Event::TestCtrlWrite { .. } => "test-ctrl-write",
                Event::RealBit(_) => "real-bit",
                Event::TraceBit(_) => "trace-bit",
                Event::Load { .. } => "load",
                Event::Put { .. } => "put",
            },
        )?;
        if let Some((vm, vcpu)) = self.subject {
            json.text("vm", vm)?;
            json.number("vcpu", vcpu)?;
        }
        match self.event {
            Event::Ac(report) => {
                json.text("source", report.source)?;
                json.address("rip", report.rip)?;
                json.address("cr3", report.cr3)?;
                json.number("cpl", report.context.cpl)?;
                json.number("bits", report.code.bits())?;
                json.flag("am", report.context.cr0_am)?;
                json.flag("ac", report.context.eflags_ac)?;
                json.flag("virtual_bit", report.virtual_bit)?;
                json.flag("legacy", report.context.legacy())?;
                json.text("verdict", report.outcome)?;
                json.text("bytes", Hex(report.instruction.as_slice()))
            }
            Event::TestCtrlWrite { value, result } => {
                json.address("value", value)?;
                json.text("result", result)
            }
            Event::RealBit(RealBit { on, why }) | Event::TraceBit(RealBit { on, why }) => {
                json.flag("on", on)?;
                json.text("why", why)
            }
            Event::Load { disabled } | Event::Put { disabled } => json.flag("disabled", disabled),
        }
    }
}

/// Bytes in hexadecimal.
pub struct Hex<'a>(pub &'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A JSON object that is being written.
pub struct Object<'a> {
    out: &'a mut dyn Write,
    separator: &'static str,
}

impl<'a> Object<'a> {
    fn open(out: &'a mut dyn Write) -> Result<Self, fmt::Error> {
        out.write_str("{")?;
        Ok(Self { out, separator: "" })
    }

    fn close(self) -> fmt::Result {
        self.out.write_str("}")
    }

    fn key(&mut self, key: &str) -> fmt::Result {
        write!(self.out, "{}\"{key}\":", self.separator)?;
        self.separator = ",";
        Ok(())
    }

    /// A string.
    pub fn text(&mut self, key: &str, text: impl fmt::Display) -> fmt::Result {
        self.key(key)?;
        self.out.write_str("\"")?;
        write!(Escape(self.out), "{text}")?;
        self.out.write_str("\"")
    }

    /// A number.
    pub fn number(&mut self, key: &str, number: impl Into<u64>) -> fmt::Result {
        self.key(key)?;
        write!(self.out, "{}", number.into())
    }

    /// True or false.
    pub fn flag(&mut self, key: &str, flag: bool) -> fmt::Result {
        self.key(key)?;
        write!(self.out, "{flag}")
    }

    /// An address or another 64-bit value, as a string "0x…": JSON numbers lose bits.
    pub fn address(&mut self, key: &str, address: u64) -> fmt::Result {
        self.text(key, format_args!("{address:#x}"))
    }

    /// An object.
    pub fn object(
        &mut self,
        key: &str,
        fields: impl FnOnce(&mut Object<'_>) -> fmt::Result,
    ) -> fmt::Result {
        self.key(key)?;
        let mut inner = Object::open(self.out)?;
        fields(&mut inner)?;
        inner.close()
    }
}

/// Writes what is put in as the inside of a JSON string.
struct Escape<'a>(&'a mut dyn Write);

impl Write for Escape<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.chars().try_for_each(|c| match c {
            '"' | '\\' => write!(self.0, "\\{c}"),
            '\n' => self.0.write_str("\\n"),
            c if c.is_control() => write!(self.0, "\\u{:04x}", u32::from(c)),
            c => self.0.write_char(c),
        })
    }
}

/// What an object of these fields looks like.
#[cfg(test)]
pub fn object(fields: impl FnOnce(&mut Object<'_>) -> fmt::Result) -> String {
    let mut text = String::new();
    let mut json = Object::open(&mut text).unwrap();
    fields(&mut json).unwrap();
    json.close().unwrap();
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use sld::{AcContext, Source, Why};
    use std::string::String;
    use vmx::emulate::operand::CodeSize;
    use vmx::run::InstructionBytes;
    use vmx::split_lock::AcOutcome;

    const STAMP: Stamp = Stamp { tsc: 7, cpu: 3, seq: 5 };

    fn written(subject: Option<Subject>, event: Event) -> String {
        object(|json| Record { stamp: STAMP, subject, event }.write(json))
    }

    #[test]
    fn events_have_their_fields() {
        let context = AcContext { cpl: 3, cr0_am: true, eflags_ac: false };
        let mut bytes = [0; 15];
        bytes[..2].copy_from_slice(&[0xf0, 0x01]);
        let report = AcReport {
            source: Source::Msr,
            rip: 0x10_0000,
            cr3: 0x5000,
            context,
            virtual_bit: false,
            outcome: AcOutcome::Kill,
            first: false,
            code: CodeSize::Bits32,
            instruction: InstructionBytes::new(bytes, 2),
        };
        assert_eq!(
            written(Some(("a", 2)), Event::Ac(report)),
            r#"{"event":"ac","vm":"a","vcpu":2,"source":"msr","rip":"0x100000","cr3":"0x5000","cpl":3,"bits":32,"am":true,"ac":false,"virtual_bit":false,"legacy":false,"verdict":"kill","bytes":"f001"}"#
        );
        assert_eq!(
            written(None, Event::RealBit(RealBit { on: true, why: Why::Boot })),
            r#"{"event":"real-bit","on":true,"why":"boot"}"#
        );
        assert_eq!(
            written(Some(("a", 1)), Event::TraceBit(RealBit { on: false, why: Why::Warn })),
            r#"{"event":"trace-bit","vm":"a","vcpu":1,"on":false,"why":"warn"}"#
        );
        assert_eq!(
            written(
                Some(("a", 0)),
                Event::TestCtrlWrite { value: 1 << 29, result: MsrWrite::Stored }
            ),
            r#"{"event":"test-ctrl-write","vm":"a","vcpu":0,"value":"0x20000000","result":"stored"}"#
        );
        for (event, name) in
            [(Event::Load { disabled: true }, "load"), (Event::Put { disabled: true }, "put")]
        {
            let expected = r#"{"event":"NAME","vm":"a","vcpu":0,"disabled":true}"#;
            assert_eq!(written(Some(("a", 0)), event), expected.replace("NAME", name));
        }
    }

    #[test]
    fn lines_say_where_and_when() {
        let mut text = String::new();
        line(&mut text, STAMP, |json| json.text("event", "boot")).unwrap();
        assert_eq!(text, "{\"seq\":5,\"tsc\":7,\"cpu\":3,\"event\":\"boot\"}\n");
    }

    #[test]
    fn a_ring_says_when_the_guest_has_to_wait() {
        let mut ring = Ring::new();
        let event = Event::RealBit(RealBit { on: true, why: Why::Load });
        for count in 1..=RING {
            ring.push(STAMP, None, event);
            assert_eq!(ring.is_over_half(), count > RING / 2);
            assert_eq!(ring.is_nearly_full(), count > RING - MARGIN);
        }
        ring.write_all();
        assert!(ring.is_empty() && !ring.write_one());
    }

    #[test]
    fn strings_are_escaped() {
        let mut text = String::new();
        write!(Escape(&mut text), "a\"b\\c\nd\u{1}").unwrap();
        assert_eq!(text, r#"a\"b\\c\nd\u0001"#);
    }
}
