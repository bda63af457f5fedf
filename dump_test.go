package ringfence
import ("testing";"os")
func TestDump(t *testing.T){ os.WriteFile("/tmp/v5.lua",[]byte(redisScripts.charge.text),0o644) }
