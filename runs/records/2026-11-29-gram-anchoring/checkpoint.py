"""The teacher of a checkpoint as a weight file: checkpoint.py CHECKPOINT TEACHER_FILE OUTPUT"""
import json, sys
from safetensors import safe_open
from safetensors.numpy import save_file
ck, like, out = sys.argv[1:]
meta = json.loads(safe_open(like, 'np').metadata()['dinoxide']); meta['fingerprint'] = None
s = safe_open(ck + '/state.safetensors', 'np')
p = 'teacher.backbone.'
save_file({k[len(p):]: s.get_tensor(k) for k in s.keys() if k.startswith(p)}, out, {'dinoxide': json.dumps(meta)})
