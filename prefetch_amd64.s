#include "textflag.h"

// func prefetch(p unsafe.Pointer)
TEXT ·prefetch(SB), NOSPLIT, $0-8
	MOVQ p+0(FP), AX
	// PREFETCHW (AX), which the assembler has no name for. It fetches the line to be
	// written; processors that lack it take it for a NOP.
	BYTE $0x0F; BYTE $0x0D; BYTE $0x08
	RET
